"""What tests of a real gateway process under attack have in common."""
