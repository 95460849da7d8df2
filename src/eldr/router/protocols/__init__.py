"""What is said over HTTP: the OpenAI API of clients, and what engines expect of a prefill and a decode leg."""
