"""What a device computes with: precision, ranks, exact search, smaller passes where memory runs out."""
