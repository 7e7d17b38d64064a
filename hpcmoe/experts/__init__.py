"""What happens to a token where its expert lives."""
