"""Requests made up from the API's own schema, good and bad: none of them is a server's error."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from requests.exceptions import ChunkedEncodingError, ConnectionError

from clipkit.web.server import MAX_HEADERS
from tests.helpers.web_toys import application, build, running

OPERATIONS = [
    ("/search", "GET"),
    ("/search", "POST"),
    ("/similar/{key}", "GET"),
    ("/classify", "POST"),
    ("/image/{key}", "GET"),
    ("/thumb/{key}", "GET"),
    ("/upload/{name}", "GET"),
    ("/info", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    index = build(tmp_path_factory.mktemp("schema"), per_colour=1)
    with running(application(index)[0]) as port:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")


def test_no_operation_is_left_out(api):
    found = {(one.ok().path, one.ok().method.upper()) for one in api.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("good", [True, False])
def test_made_up_requests_are_answered_or_refused(api, path, method, good):
    operation = api[path][method]
    modes = schemathesis.GenerationMode
    mode = modes.POSITIVE if good else modes.NEGATIVE

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        try:
            assert case.call().status_code < 500
        except (ConnectionError, ChunkedEncodingError):  # too long a line, and hung up on
            assert len(case.as_curl_command()) > MAX_HEADERS

    if good or operation.body or operation.query:  # any text is a good key
        ask()
