"""A cut of the paper's own profile, on stand-ins under the hub's names, through its notebooks."""

import pytest
import rehearsal

MODEL = "google-bert/bert-base-uncased"
CUT = {
    "model": MODEL, "task": "[sst2, emotion]", "seeds": "[0, 1]", "levels": "1/2", "scans": "{}",
    "init_levels": "[]", "probe_levels": "1/2", "probe_tasks": "[sst2, mrpc, stsb]",
    "healed_tasks": "sst2",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_papers_profile_ends_with_a_verdict_or_a_reason_for_every_claim(tmp_path):
    names = [
        MODEL,
        "google-bert/bert-base-cased",
        "FacebookAI/roberta-base",
        "xlnet/xlnet-base-cased",
    ]
    options = [word for name, value in CUT.items() for word in ("-p", name, value)]
    claims = rehearsal.run(tmp_path, rehearsal.build(tmp_path, names, rows=30), *options)
    assert claims[["verdict", "reason"]].notna().all(axis=None)
    tested = set(claims.loc[claims["verdict"] != "not tested", "claim"])
    assert {"A1", "A3", "W", "B1", "B2", "B3", "H", "M1"} <= tested
