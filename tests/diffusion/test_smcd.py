"""SMCD's stored guidance (tests/data/parity_smcd)."""

import pytest
from parity import TOLERANCE, relative_error
from parity_smcd import META, assert_close, draw, expected

from imageconductor.diffusion.guidance import classifier_free_guidance, scene_guidance
from imageconductor.sampling.branches import Control, plan


@pytest.fixture(scope="module")
def reference():
    return expected()


def test_guidance(reference):
    """The published combinations by their recorded weights; nested guidance without the image's is the published."""
    e = {key: reference[f"guid/{key}"] for key in META["guidance"][0]["weights"]}
    for record in META["guidance"]:
        combined = sum(weight * e[name] for name, weight in record["weights"].items())
        assert relative_error(combined, reference[record["key"]]) <= TOLERANCE, record["key"]
        assert sum(record["weights"].values()) == pytest.approx(record["sum_of_weights"])
        if not record["img_free_guidance"] and not record["ti_free_guidance"]:
            assert record["sum_of_weights"] == 1
            branches = plan(Control.BASE, record["guidance_scale"], has_trajectories=False)
            weights = {"uncond": record["weights"]["e_0_v"], "prompt": record["weights"]["e_c_v"]}
            # An evaluation without weight is left out here, and made there.
            assert len(branches) == record["model_calls"] - list(weights.values()).count(0)
            assert {branch.text: branch.weight for branch in branches} == {k: w for k, w in weights.items() if w}
            plain = classifier_free_guidance(e["e_0_v"], e["e_c_v"], record["guidance_scale"])
            assert_close(plain, reference, record["key"])
    undirected = draw("guid/e_uncond_all", *e["e_c_v"].shape)
    assert_close(undirected, reference, "guid/e_0_0")
    nested = [key for key in reference if key.startswith("guid/nested_img")]
    assert nested
    for key in nested:
        image, text = (float(value) for value in key.removeprefix("guid/nested_img").split("_txt"))
        guided = classifier_free_guidance(e["e_0_v"], e["e_c_v"], text)
        assert_close(scene_guidance(guided, e["e_0_v"], undirected, image), reference, key)
