"""Keeps the requests of schemathesis short: a start that is valid would wait for a VM that is not there."""

import schemathesis


@schemathesis.hook
def map_body(_context, body):
    """A start that may begin has a second."""
    if isinstance(body, dict) and isinstance(body.get("addresses"), list):
        deadline = body.get("deadlineSeconds")
        if deadline is None or (isinstance(deadline, int) and 1 < deadline <= 86400):
            body["deadlineSeconds"] = 1
    return body
