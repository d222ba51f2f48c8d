"""A cut of the paper's own profile, on stand-ins under the hub's names, through its notebooks."""

import os

import pytest
import rehearsal

MODEL = "google-bert/bert-base-uncased"
CUT = {
    "model": MODEL, "task": "sst2", "seeds": "[0, 1]", "levels": "1/2", "scans": "{}",
    "init_levels": "[]", "scratch": "false", "probe_models": "xlnet/xlnet-base-cased",
    "probe_tasks": "[sst2, stsb]", "healed_tasks": "sst2", "probe_levels": "1/2",
    "corpus": "treebank", "column": "pos",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    "REHEARSE" not in os.environ, reason="two minutes: make rehearse, or REHEARSE=1"
)
@pytest.mark.timeout(1800)
def test_the_papers_profile_ends_with_a_verdict_or_a_reason_for_every_claim(tmp_path):
    names = [MODEL, "xlnet/xlnet-base-cased"]
    options = [word for name, value in CUT.items() for word in ("-p", name, value)]
    claims = rehearsal.run(tmp_path, rehearsal.build(tmp_path, names, rows=30), *options)
    assert claims[["verdict", "reason"]].notna().all(axis=None)
    tested = set(claims.loc[claims["verdict"] != "not tested", "claim"])
    assert {"A1", "A3", "B2", "H-gap", "M1"} <= tested  # made-up tasks are at chance
