"""What can be known before anything is computed: whether models, lengths and parameters go together."""
