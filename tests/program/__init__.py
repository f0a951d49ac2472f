"""The built file as a process."""
