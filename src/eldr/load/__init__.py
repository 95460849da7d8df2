"""The load client: streams completions against a server and measures what a user would see."""
