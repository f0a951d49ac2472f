"""What stockrt costs, measured side by side with a plain loop."""
