"""The HTTP protocols: the OpenAI API for clients, and the bodies that engines expect for prefill and decode."""
