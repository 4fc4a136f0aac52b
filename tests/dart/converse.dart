/// An IDE that follows docs/connect.md: `dart converse.dart GATEWAY SESSION MESSAGE`.
///
/// Asks, approves and runs what the agent wants run, comes back when it is cut off, and repeats under the
/// same id what has no answer. Prints every event as a line of JSON; ends when the answer has.
library;

import 'dart:async';
import 'dart:convert';
import 'dart:io';

import 'conversation.dart';

/// The protocol's: who is closed with one of these does not come back.
const stayAway = {1000, 1009, 4400, 4403};

Future<void> main(List<String> arguments) async {
  final [gateway, sessionId, content] = arguments;
  final ide = Ide();
  ide.say({'type': 'user_message', 'id': 'question', 'content': content});
  for (var failures = 0; failures < 10;) {
    try {
      await for (final event in ide.conversation.connect(Uri.parse(gateway), sessionId)) {
        failures = 0;
        print(jsonEncode(event));
        ide.take(event);
      }
      stderr.writeln('ended with ${ide.conversation.closeCode}');
      if (stayAway.contains(ide.conversation.closeCode)) return;
    } on Exception catch (error) {
      stderr.writeln('failed: $error');
      failures++;
    }
    await Future<void>.delayed(const Duration(milliseconds: 20));
  }
  exitCode = 3;
}

class Ide {
  final conversation = Conversation();
  final _unanswered = <Object?, Map<String, Object?>>{};
  bool _isAnswered = false;
  bool _isOver = false;

  void say(Map<String, Object?> message) {
    _unanswered[message['id']] = message;
    conversation.send(message);
  }

  void take(Map<String, dynamic> event) {
    switch (event['type']) {
      case 'welcome':
        _unanswered.values.forEach(conversation.send);
      case 'ack' || 'nack':
        _unanswered.remove(event['id']);
      case 'tool_call':
        final call = event['call_id'];
        say({'type': 'hitl_decision', 'id': 'decide $call', 'call_id': call, 'decision': 'approve'});
        say({'type': 'tool_result', 'id': 'result $call', 'call_id': call, 'result': 'written'});
      case 'assistant_message' when event['is_final'] == true:
        _isAnswered = true;
      case 'turn_ended' when _isAnswered:
        _isOver = true;
    }
    // Once this frame is acknowledged, too.
    if (_isOver && _unanswered.isEmpty) Future(conversation.close);
  }
}
