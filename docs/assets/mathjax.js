// Read by MathJax when it starts. It sets only what pymdownx.arithmatex has marked.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: {
    enableMenu: false, // some entries of its menu load files from another server
    ignoreHtmlClass: ".*",
    processHtmlClass: "arithmatex",
  },
};
