// Read by check_in_browser.py. The value is a list of what a reader would see broken on this page.
(() => {
  const faults = [];
  const root = document.documentElement;
  const article = document.querySelector("article") ?? document.body;
  const name = (node) => `<${node.tagName.toLowerCase()}> ${(node.alt || node.textContent || "").trim().slice(0, 60)}`;
  const visible = (node) => node.getClientRects().length > 0;

  if (root.scrollWidth > innerWidth) {
    faults.push(`the page scrolls sideways: ${root.scrollWidth} of ${innerWidth} px`);
  }

  // The nearest box that scrolls sideways, or the page.
  const scroller = (node) => {
    for (let box = node; box && box !== root; box = box.parentElement) {
      if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return box;
    }
    return root;
  };
  for (const node of article.querySelectorAll("pre, pre > code, table, img, svg, p, li, mjx-container")) {
    if (!visible(node) || node.closest(".md-clipboard, .headerlink")) continue;
    const box = scroller(node);
    const hides = getComputedStyle(node).overflowX === "hidden" && node.scrollWidth > node.clientWidth + 1;
    const leaves = box === root && node.getBoundingClientRect().right > Math.max(innerWidth, root.clientWidth) + 1;
    const spills = box !== node && node.matches("pre") && node.scrollWidth > node.clientWidth + 1;
    if (hides || leaves || spills) faults.push(`cut at the edge, without scroll: ${name(node)}`);
  }

  for (const image of document.images) {
    if (!image.complete || image.naturalWidth === 0) faults.push(`picture not loaded: ${image.src}`);
  }

  for (const node of document.querySelectorAll("mjx-merror, [data-mml-node='merror']")) {
    faults.push(`formula with an error: ${name(node.closest("mjx-container") ?? node)}`);
  }
  for (const node of document.querySelectorAll(".arithmatex")) {
    if (!node.querySelector("mjx-container")) faults.push(`formula not set: ${name(node)}`);
  }

  for (const formula of document.querySelectorAll("td mjx-container")) {
    const cell = formula.closest("td").getBoundingClientRect();
    if (formula.getBoundingClientRect().right > cell.right + 1) faults.push(`formula leaves its cell: ${name(formula)}`);
  }

  // MathJax draws 1000 units per em.
  for (const drawing of document.querySelectorAll("mjx-container > svg[viewBox]")) {
    const size = parseFloat(getComputedStyle(drawing.parentElement).fontSize);
    const drawn = (1000 * drawing.getBoundingClientRect().width) / drawing.viewBox.baseVal.width;
    if (visible(drawing) && drawn < 0.8 * size) faults.push(`formula at ${drawn.toFixed(1)} of ${size.toFixed(1)} px`);
  }

  // Contrast of text, as WCAG computes it.
  const channels = (color) => (color.match(/[\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => {
    const linear = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
  const ground = (node) => {
    const layers = [];
    for (let box = node; box; box = box.parentElement) {
      const color = channels(getComputedStyle(box).backgroundColor);
      if (color[3] !== 0) layers.push(color);
      if (color[3] === undefined) break;
    }
    return layers.reverse().reduce((below, color) => over(color, below), [255, 255, 255]);
  };
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  const dim = new Map();
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim();
    const node = texts.currentNode.parentElement;
    if (!text || !visible(node) || node.closest("script, style, .headerlink, .md-clipboard, mjx-container")) continue;
    if (!node.closest("pre, code") && /\\\(|\\\[|\$\$|\$[^\s$][^$]*[^\s$]\$/.test(text)) {
      faults.push(`formula not marked: ${text.slice(0, 60)}`);
    }
    const below = ground(node);
    const [light, dark] = [luminance(over(channels(getComputedStyle(node).color), below)), luminance(below)].sort().reverse();
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 3) dim.set(`${node.tagName} ${node.className}`, `${contrast.toFixed(1)} : 1 for ${name(node)}`);
  }
  for (const text of dim.values()) faults.push(`hard to read, contrast ${text}`);
  return faults;
})();
