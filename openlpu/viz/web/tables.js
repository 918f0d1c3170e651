// In: figures. Out: the tiles, the strip of the step, the legends and the tables.

const swatch = (color) => make("span", { class: "swatch", style: { background: color } });

function tiles(data) {
  const { step, memory, chip } = data,
    [act] = step.uses[data.units.indexOf("MXM act")];
  const tile = (name, value, unit, note) =>
    make(
      "div",
      {},
      make("dt", {}, name),
      make("dd", {}, value, " ", make("small", {}, unit)),
      make("dd", {}, note),
    );
  const [time, timeUnit] = timeText(step.seconds).split(" ");
  const [used, usedUnit] = bytesText(memory.used).split(" ");
  find("#figures").replaceChildren(
    tile("A step takes", whole(step.cycles), "cycles", plural(step.runs, "section run")),
    tile("Time", time, timeUnit, `at ${whole(chip.clock_hz / 1e6)} MHz`),
    tile(
      "Rate",
      step.seconds ? whole(1 / step.seconds) : "–",
      "steps/s",
      "one step after the other",
    ),
    tile(
      "Memory",
      used,
      usedUnit,
      `${percent(memory.used / chip.memory_bytes)} of ${bytesText(chip.memory_bytes)}`,
    ),
    tile("MXM act", percent(act).replace(" %", ""), "%", "of all plane cycles"),
    tile(
      "Bound by",
      step.binds,
      "",
      step.binds === "latency" ? "no unit is half busy" : "the fullest unit of the step",
    ),
  );
}

function kindLegend(data) {
  const colors = kindColors(data.memory.kinds),
    sizes = data.memory.kinds.map(() => 0);
  for (const row of data.memory.table) sizes[row.kind] += row.bytes;
  const free = data.chip.memory_bytes - data.memory.used;
  find("#kinds").replaceChildren(
    ...data.memory.kinds.map((kind, i) =>
      sizes[i]
        ? make(
            "div",
            {},
            swatch(colors[i]),
            make("b", {}, kind),
            make("span", {}, bytesText(sizes[i])),
          )
        : "",
    ),
    make(
      "div",
      {},
      swatch(css("--cell-edge")),
      make("b", {}, "free"),
      make("span", {}, bytesText(free)),
    ),
  );
}

// Sections in plan order. A loop stands once around its body, which is as wide as one iteration.
function strip(data, choose) {
  const total = data.step.cycles || 1;
  const share = (part) => percent(part.cycles / total);
  const weight = (part) =>
    (part.section >= 0
      ? data.sections[part.section].cycles
      : part.body.reduce((sum, p) => sum + weight(p), 0)) || 1;
  const node = (part) => {
    const flex = `${Math.max(1, weight(part) ** 0.7)} 1 auto`;
    if (part.section < 0) {
      const mean = part.times ? part.iterations / part.times : 0;
      const times = Number.isInteger(mean) ? whole(mean) : `${mean.toFixed(1)} on average`;
      return make(
        "div",
        { class: part.iterations ? "loop" : "loop idle", style: { flex } },
        make(
          "p",
          {},
          make("b", {}, `${part.var} × ${times}`),
          make("span", {}, `${whole(part.cycles)} cycles, ${share(part)}`),
        ),
        make("div", { class: "body" }, ...part.body.map(node)),
      );
    }
    const section = data.sections[part.section];
    const title =
      `${section.name}: ${whole(section.cycles)} cycles, ` +
      `runs ${plural(part.times, "time")} here`;
    return make(
      "button",
      {
        type: "button",
        title,
        style: { flex },
        class: part.times ? "" : "idle",
        "data-section": part.section,
        "aria-pressed": "false",
        onclick: () => choose(part.section),
      },
      make("b", {}, section.name),
      make("span", {}, `${whole(section.cycles)} × ${whole(part.times)}`),
      make("i", { style: { width: `${(100 * part.cycles) / total}%` } }),
    );
  };
  find("#strip").replaceChildren(...data.plan.map(node));
}

const pill = (binds) => make("span", { class: binds === "latency" ? "pill waits" : "pill" }, binds);

function meter([share, tightest], unit) {
  const title = `${unit}: ${percent(share)} of all slots; fullest pool ${percent(tightest)}`;
  const clip = (x) => `${Math.min(100, 100 * x)}%`;
  return make(
    "td",
    { class: "bar", title },
    share ? percent(share) : "–",
    make(
      "div",
      { class: "meter" },
      make("i", { style: { width: clip(share) } }),
      tightest ? make("u", { style: { left: `calc(${clip(tightest)} - 1px)` } }) : null,
    ),
  );
}

function useTable(data, choose) {
  const head = ["section", "cycles", "runs", "of the step", ...data.units, "bound by"];
  const row = (entry, name, cycles, runs, share, extra) =>
    make(
      "tr",
      extra,
      make("td", { class: "name", title: name }, name),
      make("td", {}, whole(cycles)),
      make("td", {}, runs),
      make("td", {}, percent(share)),
      ...entry.uses.map((use, u) => meter(use, data.units[u])),
      make("td", {}, pill(entry.binds)),
    );
  find("#use").replaceChildren(
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", {}, text)))),
    make(
      "tbody",
      {},
      ...data.sections.map((section, s) =>
        row(
          section,
          section.name,
          section.cycles,
          whole(section.runs),
          (section.runs * section.cycles) / (data.step.cycles || 1),
          { "data-section": s, onclick: () => choose(s) },
        ),
      ),
      row(data.step, "whole step", data.step.cycles, whole(data.step.runs), 1, { class: "total" }),
    ),
  );
}

function operationTable(data, section, colors, look) {
  const head = [
    "operation",
    "first",
    "last",
    "cycles",
    "issues",
    "in the section",
    ...data.units,
    "bound by",
  ];
  find("#ops-note").textContent =
    `of ${section.name}; first to last issue. Choose one to see it in the timeline.`;
  find("#ops").replaceChildren(
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ...head.map((text) => make("th", text === "in the section" ? { class: "left" } : {}, text)),
      ),
    ),
    make(
      "tbody",
      {},
      ...section.operations.map((o) => {
        const name = section.tags[o.tag] || "(no name)",
          length = o.last - o.first + 1;
        return make(
          "tr",
          { onclick: () => look(o), "data-tag": o.tag },
          make("td", { class: "name", title: name }, swatch(colors[o.tag]), name),
          make("td", {}, whole(o.first)),
          make("td", {}, whole(o.last)),
          make("td", {}, whole(length)),
          make("td", {}, whole(o.issues)),
          make(
            "td",
            {},
            make(
              "div",
              { class: "span" },
              make("i", {
                style: {
                  left: `${(100 * o.first) / section.cycles}%`,
                  width: `${(100 * length) / section.cycles}%`,
                  background: colors[o.tag],
                },
              }),
            ),
          ),
          ...o.uses.map((use, u) => meter(use, data.units[u])),
          make("td", {}, pill(o.binds)),
        );
      }),
    ),
  );
}

function operationLegend(section, colors, timeline) {
  find("#operations-legend").replaceChildren(
    ...section.operations.map((o) =>
      make(
        "button",
        {
          type: "button",
          "aria-pressed": "false",
          "data-tag": o.tag,
          onclick: () => timeline.keep(o.tag),
          onpointerenter: () => timeline.light(o.tag),
          onpointerleave: () => timeline.light(-1),
        },
        swatch(colors[o.tag]),
        make("b", {}, section.tags[o.tag] || "(no name)"),
      ),
    ),
  );
}

function memoryTable(data) {
  const colors = kindColors(data.memory.kinds),
    sum = data.chip.memory_bytes;
  const row = (region, kind, color, bytes, extra = {}) =>
    make(
      "tr",
      extra,
      make("td", { class: "name" }, region),
      make("td", { class: "name left" }, color ? swatch(color) : null, kind),
      make("td", {}, whole(bytes / data.chip.lanes)),
      make("td", {}, whole(bytes)),
      make("td", {}, bytesText(bytes)),
      make(
        "td",
        { class: "bar" },
        percent(bytes / sum),
        make(
          "div",
          { class: "meter" },
          make("i", {
            style: { width: `${(100 * bytes) / sum}%`, background: color || css("--accent") },
          }),
        ),
      ),
    );
  find("#memory").replaceChildren(
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ...["region", "contents", "words", "bytes", "", "of the chip"].map((text, i) =>
          make("th", i === 1 ? { class: "left" } : {}, text),
        ),
      ),
    ),
    make(
      "tbody",
      {},
      ...data.memory.table.map((r) =>
        row(r.region || "(no region)", data.memory.kinds[r.kind], colors[r.kind], r.bytes),
      ),
      row("all", "", "", data.memory.used, { class: "total" }),
    ),
  );
}
