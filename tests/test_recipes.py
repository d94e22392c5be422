import jax
import pytest

from tests.pages import check_links, run_page


def test_every_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = run_page("docs/recipes.md", least=8)
    with pytest.raises(TypeError, match="forward-mode"):  # as the page says
        jax.jvp(page["loss"], (page["params"],), (page["v"],))


def test_links_within_the_recipes_lead_somewhere():
    check_links("docs/recipes.md")
