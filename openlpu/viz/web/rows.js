// In: one section's bursts and stream intervals. Out: rows of bars, by unit, as the timeline shows
// them.

// Rows by group; a row is a list of items {start, end, tag, i}, by start.
function rowGroups(data, section) {
  const { bursts, flows, chip } = data;
  const rows = chip.queues.map(() => []),
    writes = chip.queues.slice(0, chip.slices).map(() => []);
  const { first, bursts: count, flow_first, flows: flow_count } = section;
  for (let i = first; i < first + count; i += 1) {
    const queue = bursts.queue[i],
      op = data.ops[bursts.op[i]];
    const item = {
      start: bursts.cycle[i],
      end: bursts.cycle[i] + (bursts.count[i] - 1) * bursts.period[i] + 1,
      period: bursts.period[i],
      count: bursts.count[i],
      tag: bursts.tag[i],
      i,
      flow: false,
    };
    (queue < chip.slices && !["read", "gather"].includes(op) ? writes : rows)[queue].push(item);
  }
  const streams = Array.from(
    { length: Math.ceil((2 * chip.streams) / chip.stream_group) },
    () => [],
  );
  for (let i = flow_first; i < flow_first + flow_count; i += 1) {
    streams[flows.group[i]].push({
      start: flows.start[i],
      end: flows.end[i],
      period: 1,
      count: 1,
      tag: flows.tag[i],
      i,
      flow: true,
    });
  }
  for (const row of [...rows, ...writes, ...streams]) row.sort((a, b) => a.start - b.start);
  const half = chip.slices / 2,
    planes = 3 * chip.planes,
    groupsOf = streams.length / 2;
  const member = (list, from, n, name) =>
    Array.from({ length: n }, (_, k) => ({ name: name(k), items: list[from + k] }));
  const queueName = (from) => (k) => chip.queues[from + k];
  const first_alu = chip.slices + planes,
    first_sxm = first_alu + chip.alus;
  const groupName = (side) => (k) =>
    `${"we"[side]}${k * chip.stream_group}–${(k + 1) * chip.stream_group - 1}`;
  return [
    { name: "Operations", lanes: operationLanes(section), thin: 17, wide: 17, fixed: true },
    {
      name: "MXM",
      lanes: member(rows, chip.slices, planes, queueName(chip.slices)),
      thin: 5,
      wide: 14,
    },
    {
      name: "VXM",
      lanes: member(rows, first_alu, chip.alus, queueName(first_alu)),
      thin: 6,
      wide: 14,
    },
    ...[0, 1].map((side) => ({
      name: `SXM ${["west", "east"][side]}`,
      thin: 2,
      wide: 14,
      lanes: member(
        rows,
        first_sxm + side * chip.sxm_queues,
        chip.sxm_queues,
        queueName(first_sxm + side * chip.sxm_queues),
      ),
    })),
    ...[0, 1].map((side) => ({
      name: `streams ${["west", "east"][side]}`,
      thin: 4,
      wide: 14,
      lanes: member(streams, side * groupsOf, groupsOf, groupName(side)),
    })),
    ...[0, 1].flatMap((side) =>
      [
        [rows, "reads"],
        [writes, "writes"],
      ].map(([list, what]) => ({
        name: `MEM ${["west", "east"][side]} ${what}`,
        thin: half > 24 ? 1 : 2,
        wide: 14,
        lanes: member(list, side * half, half, queueName(side * half)),
      })),
    ),
  ];
}

// Operations from first to last issue, packed so that none overlaps.
function operationLanes(section) {
  const lanes = [];
  for (const operation of [...section.operations].sort((a, b) => a.first - b.first)) {
    const item = {
      start: operation.first,
      end: operation.last + 1,
      tag: operation.tag,
      operation,
    };
    let lane = lanes.find((other) => other.items.at(-1).end <= item.start);
    if (!lane) lanes.push((lane = { name: "", items: [] }));
    lane.items.push(item);
  }
  return lanes;
}
