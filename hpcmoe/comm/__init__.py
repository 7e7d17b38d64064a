"""What carries bytes: memory of a device, and messages between ranks."""
