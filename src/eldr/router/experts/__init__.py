"""Where the router learns which experts finished requests have used: one file for each source."""
