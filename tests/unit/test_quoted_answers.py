"""What is quoted of a server's answer shows no secret, however the server repeats it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from urllib.parse import quote as percent_encoded

import pytest
from pydantic import SecretStr

from composite_logstore import quote

PASSWORD = 'pÄss"wörd\\/+%41&y'
BASIC = "Basic " + b64encode(f"me:{PASSWORD}".encode()).decode()
FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in JSON": json.dumps,
    "in JSON without ASCII": lambda text: json.dumps(text, ensure_ascii=False),
    "in Python": repr,
    "in a URL": percent_encoded,
    "in a query": lambda text: percent_encoded(text, safe=""),
    "in base64": lambda text: b64encode(text.encode()).decode(),
    "in base64 within more": lambda text: b64encode(f"key={text};".encode()).decode(),
}


@pytest.mark.parametrize(
    "hidden",
    [PASSWORD, SecretStr(PASSWORD), {"headers": {"Authorization": f"Bearer {PASSWORD}"}}, {"Authorization": BASIC}],
    ids=["a text", "a secret", "a header", "basic authentication"],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_hidden_in_whichever_form_it_comes_back(form: str, hidden: object) -> None:
    quoted = quote(f"no such user: {FORMS[form](PASSWORD)}", hidden)
    assert quoted.startswith("no such user: ")
    assert "***" in quoted
    assert FORMS[form](PASSWORD)[4:-4] not in quoted


def test_a_header_of_basic_authentication_is_hidden_with_what_it_says() -> None:
    assert quote(f"{BASIC} means me:{PASSWORD}", {"Authorization": BASIC}) == "*** means me:***"


def test_what_is_no_secret_is_shown() -> None:
    assert quote("the field 'message' is too long", {"Authorization": BASIC, "x-team": "vision"}) == (
        "the field 'message' is too long"
    )
