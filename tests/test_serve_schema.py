"""In: the service's own description. Out: what it answers to generated requests is described there.

Schemathesis makes requests from /openapi.json, valid and damaged ones, for every endpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as openapi_checks
from small_api import Api, roomy_model, serving_api

EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "15"))  # for each endpoint; more by hand
CHECKS = [
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.negative_data_rejection,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("schema")
    with (
        roomy_model(folder) as model,
        serving_api(model, folder / "data", request_timeout_s=20) as api,
    ):
        yield api


@pytest.fixture(scope="module")
def description(served: Api) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_the_description_is_valid_openapi(description: Any) -> None:
    description.validate()
    paths = set(description.raw_schema["paths"])
    for endpoint in ("chat/completions", "completions", "responses", "embeddings", "models"):
        assert {f"/v1/{endpoint}", f"/openai/v1/{endpoint}"} <= paths
    assert {"/tokenize", "/detokenize"} <= paths


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_described(description: Any, mode: GenerationMode) -> None:
    """No server error but 503, and no status, type or body that the description lacks."""
    operations = [found.ok() for found in description.get_all_operations()]
    asked = 0

    for operation in operations:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            nonlocal asked
            response = case.call(timeout=30)
            asked += 1
            if response.status_code == 503:
                assert response.headers["retry-after"]
            else:
                assert response.status_code < 500
            case.validate_response(response, checks=CHECKS)

        with contextlib.suppress(Unsatisfiable):  # nothing about this endpoint can be damaged
            check()
    print(f"{asked} requests, {mode.value}")
    assert asked > EXAMPLES * len(operations) // 2
