"""Events against the rules of OpenLineage 2-0-2, stated here as a JSON schema after the specification's text."""

import json
from datetime import datetime

import jsonschema
import pytest

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.tools.lineage.text import as_lines

TEXT, URI = {"type": "string"}, {"type": "string", "format": "uri"}
TIME = {"type": "string", "format": "date-time"}


def record(required, **properties):
    return {"type": "object", "required": required.split(), "properties": properties}


FACET = record("_producer _schemaURL", _producer=URI, _schemaURL=URI)
FACETS = {"type": "object", "additionalProperties": FACET}


def dataset(**facets):
    return record("namespace name", namespace=TEXT, name=TEXT, facets=FACETS, **facets)


RUN_EVENT = record(
    "eventTime producer schemaURL run job",
    eventTime=TIME,
    producer=URI,
    schemaURL=URI,
    eventType={"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
    run=record("runId", runId={"type": "string", "format": "uuid"}, facets=FACETS),
    job=record("namespace name", namespace=TEXT, name=TEXT, facets=FACETS),
    inputs={"type": "array", "items": dataset(inputFacets=FACETS)},
    outputs={"type": "array", "items": dataset(outputFacets=FACETS)},
)
KNOWN_FACETS = {  # what these facets must hold besides
    "DatasetVersionDatasetFacet": record("datasetVersion", datasetVersion=TEXT),
    "DatasetTypeDatasetFacet": record("datasetType", datasetType=TEXT),
    "JobTypeJobFacet": record("processingType integration", processingType=TEXT, integration=TEXT, jobType=TEXT),
    "ExecutionParametersRunFacet": record(
        "", parameters={"type": "array", "items": record("key", key=TEXT, name=TEXT, description=TEXT, value=TEXT)}
    ),
}
FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date-time", raises=ValueError)
def is_time_with_zone(text):
    return "T" in text and datetime.fromisoformat(text).tzinfo is not None


@FORMATS.checks("uri")
def is_uri(text):
    scheme, colon, rest = text.partition(":")
    return bool(scheme.isalnum() and colon and rest and " " not in text)


def validate(value, schema):
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)


def facets_of(event):
    yield from event["run"]["facets"].values()
    yield from event["job"]["facets"].values()
    for each in (*event["inputs"], *event["outputs"]):
        yield from each["facets"].values()


DOCUMENT = {"params": {"seed": 1, "sft": {"epochs": 2}}, "inputs": {"source": "written"}}
DATA = Product("md5:0c.dir", "data", "prepare", inputs={"source": "written"}, names=("tiny",), document=DOCUMENT)
SFT = Product(
    "a" * 64,
    "sft",
    "sft",
    "b" * 64,
    {"data": DATA.digest, "base": "random:2x32"},
    ("rrlhf-sft/3",),
    document=DOCUMENT,
    commit="0123abc-dirty",
    created="2026-01-01T10:00:30+00:00",
    seconds=30.0,
)
EVALUATION = Product("c" * 64, "evaluate", "evaluate", "d" * 64, {"sft": SFT.digest, "data": DATA.digest})


@pytest.fixture
def told():
    return [json.loads(line) for line in as_lines(Graph([EVALUATION, SFT, DATA]), EVALUATION).splitlines()]


def test_every_event_is_valid(told):
    for event in told:
        validate(event, RUN_EVENT)
        assert event["schemaURL"] == "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
        for facet in facets_of(event):
            validate(facet, KNOWN_FACETS[facet["_schemaURL"].rpartition("/")[2]])


@pytest.mark.parametrize(
    "break_it",
    [
        lambda e: e.pop("run"),
        lambda e: e["run"].update(runId="7"),
        lambda e: e.update(eventTime="yesterday"),
        lambda e: e["outputs"].append({"name": "a"}),
        lambda e: e["job"]["facets"].update(x={}),
    ],
)
def test_the_rules_refuse_what_the_specification_does(told, break_it):
    break_it(told[0])
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate(told[0], RUN_EVENT)


def test_every_stage_has_a_start_and_an_end_and_they_come_inputs_first(told):
    assert [(event["job"]["name"], event["eventType"]) for event in told] == [
        (name, kind) for name in ("data", "sft", "evaluate") for kind in ("START", "COMPLETE")
    ]
    start, end = told[2:4]
    assert start["run"]["runId"] == end["run"]["runId"]
    assert (start["eventTime"], end["eventTime"]) == ("2026-01-01T10:00:00+00:00", "2026-01-01T10:00:30+00:00")
    parameters = end["run"]["facets"]["executionParameters"]["parameters"]
    assert {"key": "git_commit", "value": "0123abc-dirty"} in parameters


def test_outputs_of_a_stage_are_inputs_of_the_next_in_the_same_version(told):
    made = {(each["name"], each["facets"]["version"]["datasetVersion"]) for event in told for each in event["outputs"]}
    read = {(each["name"], each["facets"]["version"]["datasetVersion"]) for event in told for each in event["inputs"]}
    assert read - made == {("base", "random:2x32"), ("source", "written")}
    assert ("rrlhf-sft", SFT.digest) in read & made
