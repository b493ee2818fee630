import pytest
import torch

from ltrp_timm import create_ranker, dpc_knn, select_top
from ltrp_timm.rankers import DpcKnnRanker
from ltrp_timm.selection.coverage import density_peaks, patch_pixels, squared_distances

IMAGES = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 2, 5, 11, 12])
@pytest.mark.parametrize("side", [0, 4])
def test_the_best_k_are_the_centres_of_k_clusters(k: int, side: int) -> None:
    ranker = DpcKnnRanker(patch_size=16, neighbours=3, side=side)
    scores = ranker(IMAGES)
    assert scores.shape == (3, 4, 3)
    tokens = patch_pixels(IMAGES, (4, 3), side)
    _, centres = dpc_knn(tokens, k, k=3)
    assert torch.equal(select_top(scores.flatten(1), k), centres)
    assert torch.equal(density_peaks(squared_distances(tokens), 3), scores.flatten(1))


def test_it_keeps_one_of_each_kind() -> None:
    generator = torch.Generator().manual_seed(1)
    image = 0.05 * torch.rand(1, 3, 64, 64, generator=generator)
    image[:, 0, :16] += 0.9  # 4 patches of one kind, 12 of another
    keep = select_top(DpcKnnRanker(patch_size=16)(image).flatten(1), 2)[0]
    assert (keep < 4).tolist() == [True, False]


def test_configuration_and_patch_size() -> None:
    ranker = create_ranker("dpc_knn", patch_size=8, neighbours=4, side=2, img_size=32)
    again = create_ranker("dpc_knn", **ranker.config())
    assert again.config() == ranker.config()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), ranker(images))
    ranker.set_input_size(patch_size=(16, 16))
    assert ranker(images).shape == (2, 2, 2)
    # borders that hold no whole patch are cut
    assert DpcKnnRanker(patch_size=16)(torch.rand(1, 3, 40, 60)).shape == (1, 2, 3)


def test_wrong_arguments() -> None:
    for wrong in ({"neighbours": 0}, {"side": -1}):
        with pytest.raises(ValueError, match="neighbours must be at least 1"):
            create_ranker("dpc_knn", **wrong)
    with pytest.raises(ValueError, match="smaller than a patch"):
        DpcKnnRanker(patch_size=16)(torch.rand(1, 3, 8, 8))
