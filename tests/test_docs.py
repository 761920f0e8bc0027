import re
from pathlib import Path

from runner import arguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_explains_the_recipe_that_is_shipped() -> None:
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert f"```yaml\n{recipe}```" in README


def test_the_readme_opens_with_the_two_commands() -> None:
    first = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert first
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_every_command_in_the_readme_exists() -> None:
    known = set(arguments.COMMANDS)
    named = set(re.findall(r"(?:^|bin/|`)runner ([a-z-]+)", README, re.MULTILINE))
    assert named == known


def test_links_between_the_documents_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert "://" in target or (path.parent / target).exists(), f"{path}: {target}"
