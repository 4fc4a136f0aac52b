"""The Dart of the documentation, compiled and run by a real Dart."""
