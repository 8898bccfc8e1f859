"""From experts to a published model: a pipeline file, its steps, and `wp-run`."""
