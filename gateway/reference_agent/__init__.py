"""A runnable Agent Runtime: documents the upstream contract and makes the demo real."""
