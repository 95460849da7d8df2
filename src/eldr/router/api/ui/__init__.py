"""The web page that shows a running fleet, and the data behind it."""
