import jax
import pytest

from tests.pages import check_links, run_page


@pytest.mark.thorough
def test_every_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = run_page("docs/recipes.md", min_blocks=12)
    with pytest.raises(TypeError, match="forward-mode"):  # the page says that this raises
        jax.jvp(page["loss"], (page["params"],), (page["v"],))


def test_internal_links_of_the_recipes_are_valid():
    check_links("docs/recipes.md")
