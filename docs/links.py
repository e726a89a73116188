"Whether every link of the built site leads somewhere inside it: `python docs/links.py docs/build/html`"
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "What a page of HTML can be linked at, what it links to, and what it loads"
    def __init__(self, path:Path):
        super().__init__()
        self.anchors, self.links, self.loads = {''}, [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.anchors |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('script', 'img', 'iframe') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon', 'preload'): self.loads.append(a['href'])


def broken(
    folder:Path, # of a built site
)->list: # of str
    "What is wrong with the site's links"
    pages = {p.resolve(): Page(p) for p in sorted(folder.rglob('*.html'))}
    return [f'{path.relative_to(folder.resolve())}: {problem}' for path, page in pages.items() for problem in problems(path, page, pages)]


def problems(path:Path, page:Page, pages:dict):
    "What is wrong with one page's links; those to other sites are not followed"
    yield from (f'loads {x} from elsewhere' for x in page.loads if urlsplit(x).netloc)
    for link in [*page.links, *page.loads]:
        url = urlsplit(link)
        if url.scheme or url.netloc: continue
        target = (path.parent/unquote(url.path)).resolve() if url.path else path
        if not target.is_file(): yield f'{link} leads nowhere'
        elif target in pages and unquote(url.fragment) not in pages[target].anchors: yield f'{link}: no such place on that page'


if __name__ == '__main__':
    site = Path(sys.argv[1])
    found = broken(site)
    print('\n'.join(found) or f'{len([*site.rglob("*.html")])} pages, every link leads somewhere')
    sys.exit(bool(found))
