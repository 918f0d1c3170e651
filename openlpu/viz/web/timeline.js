// In: rows of bars (rows.js). Out: the timeline, which zooms, pans and answers
// the pointer. Each group of rows is thin until it is opened.

const GUTTER = 138,
  AXIS = 26,
  GROUP_GAP = 8,
  HEADING = 18;

class Timeline {
  constructor(data, node, events) {
    Object.assign(this, { data, node, events, chip: data.chip });
    [this.canvas, this.over] = node.querySelectorAll("canvas");
    this.gutter = node.querySelector(".gutter");
    this.open = new Set(["MXM"]);
    this.kept = -1; // the operation that a click keeps in the light
    this.lit = -1; // the one under the pointer
    this.pointer = null;
    this.total = 1;
    this.from = 0;
    this.to = 1;
    this.groups = [];
    this.listen();
  }

  show(section) {
    this.section = this.data.sections[section];
    this.kept = this.lit = -1;
    this.from = 0;
    this.to = this.total = Math.max(1, this.section.cycles);
    this.colors = operationColors(this.section.tags);
    this.groups = rowGroups(this.data, this.section);
    this.arrange();
  }

  arrange() {
    let y = AXIS + 4;
    this.gutter.replaceChildren();
    for (const group of this.groups) {
      group.wideNow = this.open.has(group.name);
      group.rowHeight = group.wideNow ? group.wide : group.thin;
      group.top = y;
      const heading = make(
        "button",
        { type: "button", "aria-expanded": String(group.wideNow || !!group.fixed) },
        group.name,
      );
      heading.style.top = `${y}px`;
      heading.addEventListener("click", () => {
        if (group.fixed) return;
        this.open[group.wideNow ? "delete" : "add"](group.name);
        this.arrange();
      });
      this.gutter.append(heading);
      // Names of open rows stand below the heading.
      group.rows = group.wideNow ? y + HEADING : y;
      y = group.rows + Math.max(group.lanes.length * group.rowHeight, HEADING) + GROUP_GAP;
    }
    this.height = y;
    this.draw();
  }

  x(cycle) {
    return GUTTER + ((cycle - this.from) / (this.to - this.from)) * (this.width - GUTTER);
  }
  cycle(x) {
    return this.from + ((x - GUTTER) / (this.width - GUTTER)) * (this.to - this.from);
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.paint();
    });
  }

  paint() {
    const [pen, width] = prepare(this.canvas, this.height);
    this.width = width;
    const scale = (width - GUTTER) / (this.to - this.from);
    const ink = {
      line: css("--line"),
      soft: css("--soft"),
      quiet: css("--quiet"),
      text: css("--ink"),
    };
    this.paper = css("--panel");
    this.axis(pen, scale, ink);
    for (const group of this.groups) {
      const high = group.lanes.length * group.rowHeight;
      pen.globalAlpha = 1;
      pen.fillStyle = ink.soft;
      if (!group.fixed) pen.fillRect(GUTTER, group.rows, width - GUTTER, Math.max(high, HEADING));
      if (group.wideNow) {
        group.lanes.forEach((lane, k) =>
          write(pen, lane.name, GUTTER - 8, group.rows + (k + 0.5) * group.rowHeight, {
            size: 10,
            align: "right",
            color: ink.quiet,
          }),
        );
      }
    }
    pen.save();
    pen.beginPath();
    pen.rect(GUTTER, AXIS, width - GUTTER, this.height);
    pen.clip();
    this.grid(pen, ink);
    const chosen = this.lit >= 0 ? this.lit : this.kept;
    for (const group of this.groups) {
      const inset = group.rowHeight > 8 ? 1.5 : group.rowHeight > 3 ? 0.5 : 0;
      group.lanes.forEach((lane, k) => {
        const y = group.rows + k * group.rowHeight + inset,
          h = group.rowHeight - 2 * inset;
        this.bars(pen, lane.items, y, h, scale, chosen, group.fixed);
      });
    }
    pen.restore();
    this.cross();
    this.events.moved(this.from, this.to);
  }

  bars(pen, items, y, h, scale, chosen, named) {
    let lastX = -1,
      alpha = 1,
      color = "";
    const dye = (tag, a) => {
      // Setting either costs more than a rectangle.
      if (this.colors[tag] !== color) pen.fillStyle = color = this.colors[tag];
      if (a !== alpha) pen.globalAlpha = alpha = a;
    };
    for (const item of items) {
      if (item.end < this.from) continue;
      if (item.start > this.to) break;
      const x = this.x(item.start),
        w = (item.end - item.start) * scale;
      // Many bursts in one pixel: one is enough.
      if (w < 1 && x - lastX < 0.75) continue;
      lastX = x;
      const dim = chosen >= 0 && item.tag !== chosen ? 0.13 : 1;
      if (named) {
        this.named(pen, item, x, y, w, h, dim);
        continue;
      }
      if (item.period > 1 && item.period * scale >= 3) {
        dye(item.tag, 0.22 * dim);
        pen.fillRect(x, y, w, h);
        dye(item.tag, dim);
        const from = Math.max(0, Math.floor((this.from - item.start) / item.period));
        const to = Math.min(item.count - 1, Math.ceil((this.to - item.start) / item.period));
        for (let n = from; n <= to; n += 1) {
          pen.fillRect(this.x(item.start + n * item.period), y, Math.max(1, scale - 0.5), h);
        }
      } else {
        dye(item.tag, dim * (item.flow ? 0.85 : Math.max(0.4, 1 / item.period)));
        pen.fillRect(x, y, Math.max(0.8, scale > 4 ? w - 0.5 : w), h);
        if (scale >= 7 && item.count > 1 && h >= 5) {
          // Close enough to tell the repetitions apart.
          pen.globalAlpha = alpha = 0.35 * dim;
          pen.fillStyle = color = this.paper;
          const from = Math.max(1, Math.floor(this.from - item.start));
          const to = Math.min(item.count - 1, Math.ceil(this.to - item.start));
          for (let n = from; n <= to; n += 1) pen.fillRect(this.x(item.start + n) - 0.5, y, 1, h);
        }
      }
    }
    pen.globalAlpha = 1;
  }

  named(pen, item, x, y, w, h, dim) {
    const left = Math.max(x, GUTTER),
      right = Math.min(x + w, this.width);
    pen.globalAlpha = dim;
    box(pen, left, y, Math.max(1.5, right - left - 0.5), h, 3, this.colors[item.tag]);
    const room = right - left - 10;
    if (room > 24) {
      pen.save();
      pen.beginPath();
      pen.rect(left, y, right - left - 4, h);
      pen.clip();
      write(pen, this.section.tags[item.tag] || "(no name)", left + 6, y + h / 2 + 0.5, {
        size: 10.5,
        weight: 550,
        color: "#0b0e14",
      });
      pen.restore();
    }
    pen.globalAlpha = 1;
  }

  ticks() {
    const room = (this.to - this.from) / Math.max(2, (this.width - GUTTER) / 92);
    const power = 10 ** Math.floor(Math.log10(room));
    const step = Math.max(
      1,
      [1, 2, 5, 10].map((n) => n * power).find((n) => n >= room),
    );
    const found = [];
    for (let c = Math.ceil(this.from / step) * step; c <= this.to; c += step) found.push(c);
    return found;
  }

  axis(pen, scale, ink) {
    for (const c of this.ticks()) {
      const x = this.x(c);
      const text = whole(c);
      if (x + 8 + 6.5 * text.length < this.width)
        write(pen, text, x + 4, 9, { size: 10.5, color: ink.quiet });
    }
    write(pen, "cycle", 14, 9, { size: 10.5, color: ink.quiet });
    // Which part of the section is in sight.
    const room = this.width - GUTTER,
      cycles = this.total;
    box(pen, GUTTER, AXIS - 7, room, 4, 2, css("--cell"));
    box(
      pen,
      GUTTER + (this.from / cycles) * room,
      AXIS - 7,
      Math.max(6, ((this.to - this.from) / cycles) * room),
      4,
      2,
      css("--accent"),
    );
  }

  grid(pen, ink) {
    pen.fillStyle = ink.line;
    for (const c of this.ticks()) pen.fillRect(Math.round(this.x(c)), AXIS, 1, this.height - AXIS);
  }

  // The line under the pointer stands on a canvas of its own: it moves more often than the bars.
  cross() {
    const [pen] = prepare(this.over, this.height),
      ink = { quiet: css("--quiet"), text: css("--ink") };
    if (this.pointer === null || this.pointer.x < GUTTER) return;
    const { x } = this.pointer;
    const c = Math.floor(this.cycle(x)),
      text = `${whole(c)}  ${timeText(Math.max(0, c) / this.chip.clock_hz)}`;
    pen.fillStyle = ink.quiet;
    pen.globalAlpha = 0.6;
    pen.fillRect(Math.round(x), AXIS, 1, this.height - AXIS);
    pen.globalAlpha = 1;
    pen.font = `600 10.5px ${FONT}`;
    const w = pen.measureText(text).width + 12,
      left = Math.min(Math.max(GUTTER, x - w / 2), this.width - w);
    box(pen, left, 1, w, 16, 5, ink.text);
    write(pen, text, left + 6, 9.5, { size: 10.5, weight: 600, color: css("--panel") });
  }

  // -- the pointer

  at(x, y) {
    if (x < GUTTER) return null;
    const near = 2 / ((this.width - GUTTER) / (this.to - this.from)),
      cycle = this.cycle(x);
    for (const group of this.groups) {
      const k = Math.floor((y - group.rows) / group.rowHeight);
      if (k < 0 || k >= group.lanes.length) continue;
      // A row of one pixel is hard to hit: its neighbours will do.
      const reach = group.rowHeight < 3 ? 2 : 0;
      let best = null,
        distance = Infinity;
      for (
        let row = Math.max(0, k - reach);
        row <= Math.min(group.lanes.length - 1, k + reach);
        row += 1
      ) {
        for (const item of group.lanes[row].items) {
          if (item.start > cycle + near) break;
          const away = Math.max(item.start - cycle, cycle - item.end, 0) + Math.abs(row - k) * near;
          if (away <= 2 * near && away <= distance) {
            best = { group, lane: group.lanes[row], item };
            distance = away;
          }
        }
      }
      return best;
    }
    return null;
  }

  tell(hit, cycle) {
    const { item, lane } = hit,
      tag = this.section.tags[item.tag] || "(no name)",
      color = this.colors[item.tag];
    const range =
      item.end - 1 > item.start
        ? `${whole(item.start)} to ${whole(item.end - 1)}`
        : whole(item.start);
    const at = ["at", timeText(item.start / this.chip.clock_hz)];
    if (item.operation) {
      const o = item.operation;
      return [
        tip.title(tag, color),
        tip.list([
          ["cycles", `${range} (${whole(o.last - o.first + 1)})`],
          at,
          ["issues", whole(o.issues)],
          ["bound by", o.binds],
          ...this.data.units
            .map((unit, u) => [unit, percent(o.uses[u][0])])
            .filter((_, u) => o.uses[u][0] > 0),
        ]),
      ];
    }
    if (item.flow) {
      const { values, hops } = this.data.flows;
      return [
        tip.title(tag, color),
        tip.list([
          ["streams", lane.name],
          ["busy in cycles", range],
          at,
          ["values", whole(values[item.i])],
          ["hops", whole(hops[item.i])],
        ]),
      ];
    }
    const { op, text } = this.data.bursts;
    const code = `${this.data.ops[op[item.i]]} ${this.data.texts[text[item.i]]}`;
    const lines = [["queue", lane.name], [item.count > 1 ? "cycles" : "cycle", range], at];
    if (item.count > 1) {
      const n = Math.min(
        item.count,
        Math.max(1, Math.floor((cycle - item.start) / item.period) + 1),
      );
      lines.push(
        [
          "count",
          `${whole(item.count)}, one ` +
            (item.period > 1 ? `every ${whole(item.period)} cycles` : "a cycle"),
        ],
        ["here", `no. ${whole(n)}`],
      );
    }
    return [tip.title(tag, color), make("code", {}, code), tip.list(lines)];
  }

  zoom(factor, x = GUTTER + (this.width - GUTTER) / 2) {
    if (!this.section) return;
    const least = Math.min(8, this.total),
      most = this.total;
    const length = Math.min(most, Math.max(least, (this.to - this.from) * factor));
    const c = this.cycle(Math.max(GUTTER, x)),
      share = (c - this.from) / (this.to - this.from);
    this.look(c - share * length, length);
  }

  fit() {
    this.look(0, this.total);
  }

  look(from, length) {
    if (!this.section) return;
    length = Math.min(Math.max(length, Math.min(8, this.total)), this.total);
    this.from = Math.min(Math.max(0, from), this.total - length);
    this.to = this.from + length;
    this.draw();
  }

  keep(tag) {
    this.kept = this.kept === tag ? -1 : tag;
    this.events.kept(this.kept);
    this.draw();
  }
  light(tag) {
    if (tag !== this.lit) {
      this.lit = tag;
      this.draw();
    }
  }

  listen() {
    const place = (event) => {
      const area = this.canvas.getBoundingClientRect();
      return { x: event.clientX - area.left, y: event.clientY - area.top };
    };
    let drag = null;
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const length = this.to - this.from;
        if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
          this.look(
            this.from + ((event.deltaX || event.deltaY) / (this.width - GUTTER)) * length,
            length,
          );
        } else {
          const lines = event.deltaMode === 1 ? 16 : 1;
          this.zoom(
            Math.exp(Math.max(-120, Math.min(120, event.deltaY * lines)) * 0.003),
            place(event).x,
          );
        }
      },
      { passive: false },
    );
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      drag = { x: event.clientX, from: this.from, moved: false };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      this.pointer = place(event);
      if (drag) {
        const by = event.clientX - drag.x;
        drag.moved ||= Math.abs(by) > 3;
        this.node.classList.toggle("drag", drag.moved);
        if (drag.moved) {
          tip.hide();
          this.look(
            drag.from - (by / (this.width - GUTTER)) * (this.to - this.from),
            this.to - this.from,
          );
          return;
        }
      }
      const hit = this.at(this.pointer.x, this.pointer.y);
      if (hit) tip.show(event, ...this.tell(hit, this.cycle(this.pointer.x)));
      else tip.hide();
      this.cross();
    });
    const end = (event) => {
      if (drag && !drag.moved && event.type === "pointerup") {
        const { x, y } = place(event),
          hit = this.at(x, y);
        if (hit || this.kept >= 0) this.keep(hit ? hit.item.tag : this.kept);
      }
      drag = null;
      this.node.classList.remove("drag");
    };
    this.canvas.addEventListener("pointerup", end);
    this.canvas.addEventListener("pointercancel", end);
    this.canvas.addEventListener("pointerleave", () => {
      this.pointer = null;
      tip.hide();
      this.cross();
    });
    this.canvas.addEventListener("dblclick", () => this.fit());
    this.node.addEventListener("keydown", (event) => {
      const length = this.to - this.from;
      const does = {
        ArrowLeft: () => this.look(this.from - length / 8, length),
        ArrowRight: () => this.look(this.from + length / 8, length),
        "+": () => this.zoom(0.7),
        "=": () => this.zoom(0.7),
        "-": () => this.zoom(1.4),
        0: () => this.fit(),
        Escape: () => {
          if (this.kept >= 0) this.keep(this.kept);
        },
      }[event.key];
      if (does && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        does();
      }
    });
  }
}
