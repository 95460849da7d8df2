"""What is served beside completions: routes, keys, models, metrics, the admin API and the page."""
