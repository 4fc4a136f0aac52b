/// What the documentation uses of package:web_socket_channel 3, by its documented interface.
///
/// Packages of Dart come from pub.dev alone, which the tests do without. As the package itself does outside
/// browsers, this stands on WebSocket of dart:io, and adds nothing to what goes over the wire.
library;

import 'dart:async';
import 'dart:io';

class WebSocketChannel {
  WebSocketChannel._(this._opening) {
    // Who cares learns of a failure from ready or stream.
    _opening.then<void>((socket) => _socket = socket).ignore();
  }

  factory WebSocketChannel.connect(Uri uri, {Iterable<String>? protocols}) =>
      WebSocketChannel._(Future.sync(() => WebSocket.connect('$uri', protocols: protocols)));

  final Future<WebSocket> _opening;
  WebSocket? _socket;

  /// Fails when there is no connection.
  Future<void> get ready => _opening;

  /// Listened to once; fails when there is no connection.
  late final Stream<dynamic> stream = Stream.fromFuture(_opening).asyncExpand((socket) => socket);

  late final WebSocketSink sink = WebSocketSink._(_opening);

  String? get protocol => _socket?.protocol;

  int? get closeCode => _socket?.closeCode;

  String? get closeReason => _socket?.closeReason;
}

class WebSocketSink implements StreamSink<dynamic> {
  WebSocketSink._(this._opening);

  final Future<WebSocket> _opening;

  /// What is added before there is a connection waits for it.
  @override
  void add(dynamic data) => _opening.then((socket) => socket.add(data)).ignore();

  @override
  void addError(Object error, [StackTrace? trace]) =>
      _opening.then((socket) => socket.addError(error, trace)).ignore();

  @override
  Future<dynamic> addStream(Stream<dynamic> stream) => _opening.then((socket) => socket.addStream(stream));

  @override
  Future<dynamic> get done => _opening.then((socket) => socket.done);

  @override
  Future<dynamic> close([int? closeCode, String? closeReason]) =>
      _opening.then((socket) => socket.close(closeCode, closeReason));
}
