"""From a user's files, or the embedded sample, to questions and passages."""
