// Draws each figure into the element that names it. On a touch screen a drag scrolls the page instead of zooming.
for (const holder of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(document.getElementById(holder.dataset.figure).textContent);
  if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;
  Plotly.newPlot(holder, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}
