"""wp-push: a merged folder to the Hub, with its card, and nothing that should not be published.

publish (the order of things) -> gate (certificate of the audit, or an audit) -> parents and licences (what may be
published, and under what) -> stage (the folder as it will be; names says which paths go) -> evaluation and card ->
secrets (no token in any file) -> upload (retry says what is tried again)
"""
