"""The page that shows a running fleet, and what it asks for."""
