"""The pages of the documentation: their commands, links and headings."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
SCRIPTS = ("train", "test", "export", "visualize")  # in the order in which they need each other


@dataclass(frozen=True)
class Link:
    page: Path
    text: str
    target: str  # as it stands: path#anchor

    @property
    def path(self) -> Path:
        name = self.target.partition("#")[0]
        return (self.page.parent / name).resolve() if name else self.page

    @property
    def anchor(self) -> str:
        return self.target.partition("#")[2]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)


def links() -> list[Link]:
    """All links into the repository."""
    found = []
    for page in PAGES:
        for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
            if "://" not in target:
                found.append(Link(page, text, target))
    return found


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub names them in a link."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@dataclass(frozen=True)
class Command:
    """`python SCRIPT.py FLAGS`, or torchrun's."""

    script: str
    flags: tuple[str, ...]
    torchrun: bool
    text: str


def commands() -> list[Command]:
    """The commands of our scripts in the pages' shell blocks, without those of batch scripts."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", read(page), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                words = [word for word in words if not word.startswith("CUDA_VISIBLE_DEVICES=")]
                if words and words[0] in ("python", "torchrun"):
                    found.append(to_command(words, line))
    return [command for command in found if command.script in SCRIPTS]


def to_command(words: list[str], text: str) -> Command:
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[place].removesuffix(".py")
    return Command(
        script, tuple(words[place + 1 :]), words[0] == "torchrun", " ".join(text.split())
    )


def shell_words() -> list[str]:
    """All that stands in shell blocks and between backticks, line by line."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", read(page), flags=re.DOTALL)
        found += [line for b in blocks for line in b.replace("\\\n", " ").splitlines()]
        found += re.findall(r"`([^`\n]+)`", prose(page))
    return found


def line_of(text: str, path: Path) -> int | None:
    """The number of the first line that defines a name, or else contains the text."""
    lines = read(path).splitlines()
    definition = re.compile(rf"\s*(def|class) {re.escape(text)}\b")
    for number, line in enumerate(lines, 1):
        if definition.match(line):
            return number
    return next((number for number, line in enumerate(lines, 1) if text in line), None)


def renumber() -> None:
    """Put the right line numbers into all links to lines: python tests/pages.py."""
    for link in links():
        if link.anchor and link.path.suffix == ".py":
            line = line_of(link.text.strip("`"), link.path)
            if line is None:
                print(f"{link.page.name}: {link.text} is not in {link.path.name}", file=sys.stderr)
                continue
            old = f"[{link.text}]({link.target})"
            new = old.replace(f"#{link.anchor})", f"#L{line})")
            link.page.write_text(read(link.page).replace(old, new), encoding="utf-8")


if __name__ == "__main__":
    renumber()
