"""The files of the chat page, which are served unchanged: nanochat/ui.html, logo.svg and ui/."""

from pathlib import Path

from nanochat.common import UserError

FOLDER = Path(__file__).parent.parent
POLICY = (  # no inline scripts or styles
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOGO_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
HEADERS = {  # by ending
    ".html": {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": POLICY},
    ".css": {"Content-Type": "text/css; charset=utf-8"},
    ".js": {"Content-Type": "text/javascript; charset=utf-8"},
    ".svg": {"Content-Type": "image/svg+xml", "Content-Security-Policy": LOGO_POLICY},
}


def page_files(folder=FOLDER) -> dict[str, tuple[bytes, dict]]:
    """URL path → (content, headers) of each file. Raises UserError if one cannot be read."""
    paths = {"/": folder / "ui.html", "/logo.svg": folder / "logo.svg"}
    paths |= {f"/ui/{path.name}": path for path in sorted((folder / "ui").glob("*")) if path.suffix in HEADERS}
    try:
        contents = {address: path.read_bytes() for address, path in paths.items()}
    except OSError as error:
        raise UserError(f"cannot read the page ({error}): restore it from the repository") from error
    return {
        address: (content, HEADERS[paths[address].suffix] | {"Cache-Control": "no-cache"})
        for address, content in contents.items()
    }
