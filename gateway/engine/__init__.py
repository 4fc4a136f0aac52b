"""The Trio part: performs what the core decides, over the ports, knowing no library but Trio."""
