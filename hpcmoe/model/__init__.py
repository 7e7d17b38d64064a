"""What is trained: a language model over bytes, its text, and what balances its routers."""
