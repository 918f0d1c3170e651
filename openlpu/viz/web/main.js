// In: the page's data. Out: the page, alive. data-state of the root says "ready" or "failed".

function fail(error) {
  document.documentElement.dataset.state = "failed";
  const node = find("#trouble");
  node.textContent = `The page cannot be drawn: ${error?.message ?? error}`;
  node.hidden = false;
}
addEventListener("error", (event) => fail(event.error ?? event.message));
addEventListener("unhandledrejection", (event) => fail(event.reason));

function paramsText(params) {
  return params
    .map(([name, values]) => {
      const same = values.every((value) => value === values[0]);
      const each = same && values.length > 1 ? ` (each of ${values.length})` : "";
      return `${name} = ${same ? values[0] : values.join(", ")}${each}`;
    })
    .join(", ");
}

const data = await unpack();
find("#title").textContent = data.title;
find("#subtitle").textContent = [
  `${data.chip.name}, ${whole(data.chip.clock_hz / 1e6)} MHz`,
  `${whole(data.step.issues)} issues a step in ${data.chip.queues.length} queues`,
  paramsText(data.params),
]
  .filter(Boolean)
  .join(" · ");

const floorplan = new Floorplan(data, find("#floorplan"));
const timeline = new Timeline(data, find("#timeline"), {
  moved(from, to) {
    find("#window").textContent =
      `cycles ${whole(from)} to ${whole(to - 1)} of ${whole(timeline.section.cycles)}, ` +
      timeText((to - from) / data.chip.clock_hz);
  },
  kept(tag) {
    for (const node of document.querySelectorAll("#operations-legend [data-tag]")) {
      node.setAttribute("aria-pressed", String(Number(node.dataset.tag) === tag));
    }
    for (const node of document.querySelectorAll("#ops [data-tag]")) {
      node.classList.toggle("chosen", Number(node.dataset.tag) === tag);
    }
  },
});

let chosen = 0;

function choose(s) {
  if (!data.sections.length) {
    floorplan.draw();
    return;
  }
  chosen = s;
  const section = data.sections[s];
  find("#section").value = String(s);
  for (const node of document.querySelectorAll("[data-section]")) {
    const on = Number(node.dataset.section) === s;
    if (node.tagName === "BUTTON") node.setAttribute("aria-pressed", String(on));
    else node.classList.toggle("chosen", on);
  }
  find("#chip-note").textContent =
    `Colours show what memory holds; bars show how busy units are in ${section.name}.`;
  floorplan.busy(s);
  timeline.show(s);
  operationLegend(section, timeline.colors, timeline);
  operationTable(data, section, timeline.colors, (o) => {
    const margin = Math.max(4, (o.last - o.first) * 0.06);
    timeline.look(o.first - margin, o.last - o.first + 1 + 2 * margin);
    if (timeline.kept !== o.tag) timeline.keep(o.tag);
    find("#timeline").scrollIntoView({ behavior: "smooth", block: "center" });
  });
}

find("#section").replaceChildren(
  ...data.sections.map((section, s) =>
    make(
      "option",
      { value: s },
      `${section.name} (${whole(section.cycles)} cycles, ${whole(section.runs)} runs)`,
    ),
  ),
);
find("#section").addEventListener("change", (event) => choose(Number(event.target.value)));
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () =>
    ({
      in: () => timeline.zoom(0.6),
      out: () => timeline.zoom(1 / 0.6),
      all: () => timeline.fit(),
    })[button.dataset.zoom](),
  );
}

function draw() {
  tiles(data);
  kindLegend(data);
  strip(data, choose);
  useTable(data, choose);
  memoryTable(data);
  choose(chosen);
}

// The section that takes most of the step is the one to look at first.
const shares = data.sections.map((section) => section.runs * section.cycles);
chosen = Math.max(0, shares.indexOf(Math.max(...shares)));
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let wide = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === wide || !data.sections.length) return;
  wide = innerWidth;
  floorplan.draw();
  timeline.draw();
});
document.documentElement.dataset.state = "ready";
