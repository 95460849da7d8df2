"""Everything served besides completions: routes, keys, models, metrics, the admin API and the page."""
