"""wp-push: from a merged folder to a model repository on the Hub."""
