"""Expert signatures from the words of a prompt, known before anything has been computed."""
