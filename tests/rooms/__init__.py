"""One file for each room of stockrt.py."""
