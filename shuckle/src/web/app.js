// The dashboard: fetches the cluster's state every two seconds and shows it.
// Whatever comes from the network goes into the page as text, never as markup.
"use strict";

const REFRESH_MS = 2000;
const TIMEOUT_MS = 5000;
const ROWS_MAX = 500;
// Groups that are not well, when nobody asks for some: mostly it is the same with all.
const GROUPS_MAX = 12;
const SHARDS = 256;
const DOMAINS_MAX = 12;

const $ = (id) => document.getElementById(id);

// ---- small things ----

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

// As eggsctl prints them.
function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${count.toFixed(unit === 0 ? 0 : 1)} ${units[unit]}`;
}

const count = (number) => number.toLocaleString("en-US");

function percent(part, whole) {
  if (whole <= 0) return 0;
  return Math.min(100, (100 * part) / whole);
}

function percentText(value) {
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value.toFixed(value < 10 ? 1 : 0)} %`;
}

function span(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${seconds % 60} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function ago(milliseconds) {
  if (milliseconds === null || milliseconds === undefined) return "never";
  return milliseconds < 2000 ? "just now" : `${span(milliseconds)} ago`;
}

// How full a disk is: the fuller, the worse.
const fullness = (value) => bar(value, value >= 95 ? "bad" : value >= 85 ? "warn" : "");
// How much of the work is done: the more, the better.
const progress = (value) => bar(value, value >= 100 ? "good" : "");

function bar(value, level) {
  const fill = element("i");
  fill.style.width = `${value}%`;
  if (level) fill.dataset.level = level;
  const track = element("div", "bar", fill);
  track.setAttribute("role", "meter");
  track.setAttribute("aria-valuenow", value.toFixed(0));
  return track;
}

// "0–127, 130" of sorted numbers.
function ranges(numbers) {
  const parts = [];
  for (let i = 0; i < numbers.length; ) {
    let j = i;
    while (j + 1 < numbers.length && numbers[j + 1] === numbers[j] + 1) j += 1;
    parts.push(i === j ? `${numbers[i]}` : `${numbers[i]}–${numbers[j]}`);
    i = j + 1;
  }
  return parts.length > 12 ? `${parts.slice(0, 12).join(", ")}, …` : parts.join(", ");
}

// Fills a table body, keeping the rows of the same key when nothing in them changed, so that
// selecting text and hovering survive the refresh.
function fill(body, items, key, build) {
  const old = new Map([...body.children].map((row) => [row.dataset.key, row]));
  const rows = items.map((item) => {
    const id = key(item);
    const row = build(item);
    row.dataset.key = id;
    const before = old.get(id);
    return before && before.isEqualNode(row) ? before : row;
  });
  if (rows.length !== body.children.length || rows.some((row, i) => row !== body.children[i])) {
    body.replaceChildren(...rows);
  }
}

function cell(label, content, className) {
  const node = element("td", className, content);
  node.dataset.label = label;
  return node;
}

// ---- the parts of the page ----

function showHealth(state) {
  const word = state.health.state;
  const pill = $("health");
  pill.dataset.level = word;
  text(pill, word);
  document.title = word === "healthy" ? "EggsFS" : `${word} – EggsFS`;
  text($("cluster-id"), state.cluster_id);
  const registry = state.registry;
  const who = registry.here ? "leads the registry" : registry.leader ? `registry led by ${registry.leader}` : "";
  text($("about"), [`up ${span(state.uptime_ms)}`, `version ${state.version}`, who].filter(Boolean).join(" · "));
  document.body.dataset.trouble = registry.trouble ? "yes" : "no";
  $("trouble").hidden = !registry.trouble;
  text($("trouble-detail"), registry.trouble ? `${registry.trouble}. What is shown below was known before.` : "");
  const reasons = state.health.reasons;
  $("problems").hidden = reasons.length === 0;
  $("problems").dataset.level = word;
  fill($("reasons"), reasons, (reason) => reason.text, (reason) => {
    const item = element("li", reason.lost ? "lost" : "", reason.text);
    item.dataset.level = reason.state;
    return item;
  });
}

function tile(name, value, small, note, noteClass) {
  const node = $(`tile-${name}`);
  const wanted = element("span", "value", value);
  wanted.id = node.id;
  if (small) wanted.append(" ", element("small", "", small));
  if (!node.isEqualNode(wanted)) node.replaceWith(wanted);
  const noteNode = $(`tile-${name}-note`);
  noteNode.className = `note ${noteClass ?? ""}`.trim();
  text(noteNode, note);
}

// Lost, given up, and all it had is elsewhere: there is nothing more to be done for it.
function isOver(disk, janitor) {
  return disk.state === "lost" && disk.flags.includes("DECOMMISSIONED")
    && janitor.tasks.some((task) => task.kind === "repair" && task.about === disk.id && task.least_redundancy === null);
}

function showTiles(state) {
  const served = state.shards.filter((shard) => shard.state === "alive" || shard.state === "degraded").length;
  const degraded = state.shard_counts.degraded;
  tile("shards", count(served), `of ${SHARDS}`,
    served < SHARDS ? `${SHARDS - served} not served` : degraded ? `${degraded} without all replicas` : "all of them",
    served < SHARDS ? "bad" : degraded ? "warn" : "");

  const well = state.hosts.filter((host) => host.stores_alive === host.stores).length;
  const draining = state.hosts.filter((host) => host.draining).length;
  const copies = state.replicas === 1 ? "one copy of metadata" : `${state.replicas} copies of metadata`;
  tile("hosts", count(well), `of ${count(state.hosts.length)}`,
    well < state.hosts.length ? `${state.hosts.length - well} not well` : draining ? `${draining} draining` : copies,
    well < state.hosts.length ? "bad" : draining ? "warn" : "");

  const disks = state.block_services;
  const over = disks.filter((disk) => isOver(disk, state.janitor)).length;
  const lost = disks.filter((disk) => disk.state === "lost").length - over;
  const stale = disks.filter((disk) => disk.state === "stale").length;
  const notes = [lost ? `${lost} LOST` : "", stale ? `${stale} not heard of` : "", over ? `${over} given up, nothing is on ${over === 1 ? "it" : "them"}` : ""].filter(Boolean);
  tile("disks", count(disks.length - lost - stale - over), `of ${count(disks.length)}`,
    notes.join(", ") || (disks.length ? "all of them" : "none registered"), lost ? "bad" : stale ? "warn" : "");

  const total = state.total;
  tile("space", bytes(total.used_bytes), "", `${bytes(total.available_bytes)} free of ${bytes(total.capacity_bytes)}`);
  const domains = state.failure_domains.length;
  const near = state.janitor.under_spread;
  const spread = near && near.of > 0 ? `; under-spread spans: ${count(near.spans)} of ${count(near.of)}` : "";
  tile("blocks", count(total.blocks), "", `on ${count(domains)} failure domain${domains === 1 ? "" : "s"}${spread}`);

  const coordinator = state.crossdir;
  tile("transactions", coordinator.address ? count(coordinator.transactions) : "–", "",
    coordinator.alive ? "coordinator well" : "no coordinator leads",
    coordinator.alive ? "" : "bad");
}

let shards = [];
let groups = [];
let stores = new Map();
let hosts = [];

const hostOf = (store) => stores.get(store)?.host ?? store;
const leaderHost = (group) => (group.leader ? hostOf(group.leader) : undefined);

function clock(milliseconds) {
  const off = Math.abs(milliseconds) > 500;
  const sign = milliseconds > 0 ? "+" : milliseconds < 0 ? "−" : "±";
  return element("span", off ? "tag bad" : "quiet", `${sign}${Math.abs(milliseconds)} ms`);
}

function showShards(state) {
  shards = state.shards;
  stores = new Map(state.stores.map((store) => [store.id, store]));
  hosts = state.hosts;
  const names = hosts.map((host) => host.name);
  const grid = $("grid");
  while (grid.children.length < SHARDS) {
    const node = element("div", "cell missing");
    node.dataset.shard = `${grid.children.length}`;
    grid.append(node);
  }
  shards.forEach((shard, i) => {
    const node = grid.children[i];
    const faded = node.classList.contains("faded") ? " faded" : "";
    const className = `cell ${shard.state}${faded}`;
    if (node.className !== className) node.className = className;
    node.dataset.host = `${Math.max(0, names.indexOf(leaderHost(shard))) % 6}`;
  });
  fill($("hosts").tBodies[0], hosts, (host) => host.name, (host) => {
    const led = shards.filter((shard) => leaderHost(shard) === host.name);
    const others = state.groups.filter((group) => leaderHost(group) === host.name).map(groupName);
    const runs = ranges(led.map((shard) => shard.shard));
    const few = runs.split(",").length <= 3;
    const leads = [led.length ? (few ? `shards ${runs}` : `${count(led.length)} shards`) : "", ...others].filter(Boolean).join(", ");
    const seen = Math.min(...state.stores.filter((store) => store.host === host.name).map((store) => store.last_seen_ms_ago ?? Infinity));
    const name = element("div", "", element("strong", "", host.name));
    if (host.stores_alive < host.stores) name.append(" ", element("span", "tag bad", host.alive ? `${host.stores_alive} of ${host.stores} stores` : "not heard of"));
    if (host.draining) name.append(" ", element("span", "tag warn", host.drain ? "draining" : "drained"));
    if (host.drain) name.append(element("small", "quiet block", host.drain));
    const row = element("tr", "",
      cell("Host", name),
      cell("Leads", leads || "–"),
      cell("Replicas", count(host.replicas), "number nowrap"),
      cell("Log", bytes(led.reduce((total, shard) => total + shard.log_bytes, 0)), "number nowrap"),
      cell("Clock", clock(host.clock_offset_ms), "number nowrap"),
      cell("Last seen", ago(seen === Infinity ? null : seen), "nowrap"));
    row.dataset.host = host.name;
    return row;
  });
  if (hosts.length === 0) {
    const nothing = element("td", "empty", "No host has registered yet.");
    nothing.colSpan = 6;
    $("hosts").tBodies[0].replaceChildren(element("tr", "", nothing));
  }
}

// ---- groups and stores ----

const GROUP_TAGS = {
  alive: ["good", "well"], degraded: ["warn", "degraded"], stale: ["bad", "no leader"], missing: ["", "not founded"],
};
const GROUP_ORDER = ["stale", "degraded", "missing", "alive"];

function groupName(group) {
  return group.shard === 256 ? "coordinator" : group.shard === 257 ? "registry" : `shard ${group.shard}`;
}

function replicaWords(replica) {
  const words = [];
  if (!replica.alive) words.push("away");
  if (replica.role !== "voter") words.push(replica.role);
  if (replica.snapshot !== undefined) words.push(`snapshot ${replica.snapshot} %`);
  else if (replica.lag) words.push(`${count(replica.lag)} behind`);
  if (replica.leaving) words.push("leaving");
  return words.join(", ");
}

function replicaChip(replica) {
  const kind = !replica.alive ? "bad" : replica.role === "leader" ? "good" : replica.role === "learner" || replica.leaving ? "warn" : "";
  const words = replicaWords(replica);
  const chip = element("span", "chip", element("span", `tag ${kind}`, hostOf(replica.store)), words ? element("small", "", ` ${words}`) : null);
  chip.title = replica.store;
  return chip;
}

// What is to change, in words.
function toBe(group) {
  const words = group.coming.filter((store) => !group.replicas.some((replica) => replica.store === store))
    .map((store) => `+ ${hostOf(store)}`);
  words.push(...group.replicas.filter((replica) => replica.leaving).map((replica) => `− ${hostOf(replica.store)}`));
  if (group.preferred && group.preferred !== group.leader) words.push(`led by ${hostOf(group.preferred)}`);
  return words.join(", ");
}

function groupRow(group) {
  const [tagClass, word] = GROUP_TAGS[group.state] ?? ["", group.state];
  const chips = element("span", "", ...group.replicas.map(replicaChip));
  return element("tr", "",
    cell("State", element("span", `tag ${tagClass}`, word), "nowrap"),
    cell("Group", groupName(group), "nowrap"),
    cell("Replicas", group.replicas.length ? chips : "–"),
    cell("To be", toBe(group) || "as it is"),
    cell("Term", count(group.term), "number"),
    cell("Applied", count(group.applied_index), "number"),
    cell("Log", bytes(group.log_bytes), "number nowrap"),
    cell("Leader heard", ago(group.last_seen_ms_ago), "nowrap"));
}

function showGroups(state) {
  if (state) groups = [...state.groups, ...state.shards];
  const wanted = $("group-filter").value.trim().toLowerCase();
  const number = /^\d+$/.test(wanted) ? Number(wanted) : null;
  const words = (group) => [groupName(group), GROUP_TAGS[group.state]?.[1] ?? "", toBe(group) ? "moving" : "",
    ...group.replicas.flatMap((replica) => [hostOf(replica.store), replica.store, replicaWords(replica)])];
  // At rest only what is not as it is to be, and the two that are one of a kind.
  const quiet = (group) => group.shard < SHARDS && (group.state === "alive" || group.state === "missing") && !toBe(group);
  const matches = (group) => !wanted ? !quiet(group)
    : number !== null ? group.shard === number : words(group).some((word) => word.toLowerCase().includes(wanted));
  const order = (group) => GROUP_ORDER.indexOf(group.state);
  const found = groups.filter(matches).sort((a, b) => order(a) - order(b));
  const shown = found.slice(0, wanted ? ROWS_MAX : GROUPS_MAX);
  fill($("groups").tBodies[0], shown, (group) => `${group.shard}`, groupRow);
  const calm = groups.filter(quiet).length;
  const notes = [];
  if (found.length > shown.length) notes.push(`${count(found.length - shown.length)} more are not shown: use the filter.`);
  if (wanted && found.length === 0) notes.push("No group matches the filter.");
  if (!wanted && calm) notes.push(`${calm === SHARDS ? "All" : "The other"} ${count(calm)} shards are as they are to be: filter to see them.`);
  text($("groups-note"), notes.join(" "));
}

function showStores(state) {
  text($("replicas-note"), state.replicas ? `${state.replicas} of everything` : "");
  fill($("stores").tBodies[0], state.stores, (store) => store.id, (store) => {
    const tag = !store.alive ? ["bad", "not heard of"] : store.problem ? ["warn", "ailing"] : store.draining ? ["warn", "draining"] : ["good", "well"];
    const where = element("div", "", element("code", "", store.address));
    if (store.problem) where.append(element("span", "problem", store.problem));
    return element("tr", "",
      cell("State", element("span", `tag ${tag[0]}`, tag[1]), "nowrap"),
      cell("Host", store.host),
      cell("Kind", store.kind),
      cell("Address", where, "where"),
      cell("Id", element("code", "", store.id), "nowrap"),
      cell("Replicas", count(store.replicas), "number"),
      cell("Leads", count(store.leaders), "number"),
      cell("Clock", clock(store.clock_offset_ms), "number nowrap"),
      cell("Last seen", ago(store.last_seen_ms_ago), "nowrap"));
  });
}

function showCapacity(state) {
  fill($("capacity"), state.classes, (one) => `${one.storage_class}`, (one) => {
    const value = percent(one.used_bytes, one.capacity_bytes);
    const notes = [`${count(one.alive)} of ${count(one.block_services)} disks alive`,
      `${count(one.writable)} take new blocks`];
    return element("div", "class",
      element("div", "top",
        element("span", "name", one.name),
        element("span", "quiet", `${bytes(one.used_bytes)} of ${bytes(one.capacity_bytes)} · ${percentText(value)}`)),
      fullness(value),
      element("p", "quiet", notes.join(" · ")));
  });
  if (state.classes.length === 0) {
    $("capacity").replaceChildren(element("p", "empty", "No disk has registered yet."));
  }
  const away = (domain) => domain.block_services - domain.alive;
  const domains = [...state.failure_domains].sort((a, b) => away(b) - away(a) || a.name.localeCompare(b.name, "en", { numeric: true }));
  fill($("domains"), domains.slice(0, DOMAINS_MAX), (domain) => domain.name, (domain) => {
    const missing = away(domain);
    return element("div", "domain",
      element("span", "name", domain.name),
      domain.capacity_bytes > 0 ? fullness(percent(domain.used_bytes, domain.capacity_bytes)) : element("span", "bar none"),
      element("span", missing ? "tag warn" : "quiet", `${count(domain.alive)} of ${count(domain.block_services)}`));
  });
  const more = domains.length - DOMAINS_MAX;
  text($("domains-note"), more > 0 ? `and ${count(more)} more, with fewer disks away` : domains.length ? "" : "None yet.");
  const coordinator = state.crossdir;
  const facts = [
    ["Leader", coordinator.address || "none"],
    ["State", coordinator.alive ? "serving" : coordinator.address ? "not heard of" : "no leader"],
    ["Transactions in flight", coordinator.address ? count(coordinator.transactions) : "–"],
  ];
  fill($("coordinator"), facts.flat().map((value, i) => ({ value, i })), ({ i }) => `${i}`, ({ value, i }) => {
    return element(i % 2 ? "dd" : "dt", "", value);
  });
}

// Those that take long; the others come and go too quickly to be read.
function showTransactions(state) {
  const slow = state.crossdir.slow_transactions;
  $("transactions").hidden = slow.length === 0;
  fill($("transactions").querySelector("tbody"), slow, (one) => one.transaction, (one) => element("tr", "",
    cell("Transaction", element("code", "", one.transaction)),
    cell("Kind", one.kind),
    cell("Age", span(one.age_ms), "number"),
    cell("Does or waits for", one.step)));
}

function showUpkeep(state) {
  const janitor = state.janitor;
  const who = janitor.host ? `janitor on ${janitor.host}, heard ${ago(janitor.last_seen_ms_ago)}` : "no janitor has registered: nothing is repaired, checked or erased";
  text($("upkeep-note"), janitor.host && !janitor.alive ? `${who}: AWAY` : who);
  fill($("tasks").tBodies[0], janitor.tasks, (task) => `${task.kind} ${task.about}`, (task) => {
    const [done, total] = task.bytes_total > 0 ? [task.bytes_done, task.bytes_total] : [task.spans_done, task.spans_total];
    const words = task.bytes_total > 0 ? `${bytes(task.bytes_done)} of ${bytes(task.bytes_total)}` : bytes(task.bytes_done);
    const repair = task.kind === "repair" && task.about;
    const empty = repair && task.least_redundancy === null;
    const risk = task.spans_lost > 0 ? `LOST ${count(task.spans_lost)}` : repair && !empty ? count(task.least_redundancy) : "–";
    const spans = task.spans_total > 0 ? `${count(task.spans_done)} of ${count(task.spans_total)} spans` : "";
    return element("tr", "",
      cell("Task", element("span", `tag ${empty ? "good" : repair ? "warn" : ""}`, task.kind), "nowrap"),
      cell("About", task.name || task.about || "everything"),
      cell("Progress", total > 0 ? element("div", "", progress(percent(done, total)), element("small", "", words)) : element("span", "quiet", words), "space"),
      cell("Rate", task.bytes_per_second > 0 ? `${bytes(task.bytes_per_second)}/s` : "–", "number nowrap"),
      cell("Left", task.seconds_left === null ? "–" : span(task.seconds_left * 1000), "number nowrap"),
      cell("Can lose", element("span", task.spans_lost > 0 ? "tag bad" : "", risk), "number"),
      cell("State", task.state || (empty ? "the disk is empty" : spans)));
  });
  $("jobs").hidden = janitor.jobs.length === 0;
  fill($("jobs").querySelector("tbody"), janitor.jobs, (job) => `${job.id}`, (job) => element("tr", "",
    cell("Job", `${job.kind} ${job.id}`, "nowrap"),
    cell("Path", element("code", "", job.path)),
    cell("State", job.done ? "done" : "under way"),
    cell("Files", count(job.files_done), "number"),
    cell("Failed", count(job.files_failed), "number"),
    cell("Bytes", bytes(job.bytes_done), "number")));
}

const STATE_TAGS = {
  lost: ["bad", "LOST"], stale: ["warn", "not heard of"], failing: ["warn", "failing"],
  restricted: ["", "restricted"], ok: ["good", "well"],
};

// Lines break between them, not in them.
function spaceWords(disk) {
  const words = [`${bytes(disk.used_bytes)} used`, `${bytes(disk.available_bytes)} free`];
  if (disk.dead_bytes > 0) words.push(`${bytes(disk.dead_bytes)} dead`);
  return words.flatMap((word, i) => [i ? " · " : "", element("span", "", word)]);
}

function diskRow(disk) {
  const over = isOver(disk, janitor);
  const [tagClass, word] = over ? ["", "given up"] : STATE_TAGS[disk.state] ?? ["", disk.state];
  const value = percent(disk.used_bytes, disk.capacity_bytes);
  const where = element("div", "", element("code", "", disk.path || "–"), element("small", "", disk.address));
  if (disk.problem) where.append(element("span", over ? "quiet block" : "problem", over ? `${disk.problem}; nothing is on it any more` : disk.problem));
  const space = disk.capacity_bytes > 0
    ? element("div", "", fullness(value), element("small", "", ...spaceWords(disk)))
    : element("span", "quiet", "unknown");
  const marks = disk.read_only ? [...disk.flags, "read-only"] : disk.flags;
  const flags = element("span", "flags", ...marks.map((flag) => element("span", flag === "LOST" && !over ? "tag bad" : "tag", flag)));
  const errors = disk.io_errors + disk.reported_blocks;
  const errorText = element("span", errors ? "tag warn" : "quiet", count(errors));
  errorText.title = `${count(disk.io_errors)} input/output errors, ${count(disk.reported_blocks)} blocks reported by readers`;
  return element("tr", disk.state === "lost" && !over ? "lost" : "",
    cell("State", element("span", `tag ${tagClass}`, word), "nowrap"),
    cell("Id", element("code", "", disk.id), "nowrap"),
    cell("Class", disk.class_name),
    cell("Failure domain", disk.failure_domain),
    cell("Where", where, "where"),
    cell("Space", space, "space"),
    cell("Blocks", count(disk.blocks), "number"),
    cell("Last seen", ago(disk.last_seen_ms_ago), "nowrap"),
    cell("Flags", flags, marks.length ? "" : "blank"),
    cell("Errors", errorText, "number"));
}

const STATE_ORDER = ["lost", "failing", "stale", "restricted", "ok"];
let disks = [];
let janitor = { tasks: [] };

function showDisks(state) {
  if (state) [disks, janitor] = [state.block_services, state.janitor];
  const wanted = $("filter").value.trim().toLowerCase();
  const matches = (disk) => !wanted || [disk.id, disk.class_name, disk.failure_domain, disk.address, disk.path,
    disk.state, disk.problem, ...disk.flags].some((value) => value.toLowerCase().includes(wanted));
  const order = (disk) => STATE_ORDER.indexOf(disk.state);
  const found = disks.filter(matches).sort((a, b) =>
    order(a) - order(b) || a.failure_domain.localeCompare(b.failure_domain, "en", { numeric: true })
      || a.path.localeCompare(b.path, "en", { numeric: true }) || (a.id < b.id ? -1 : 1));
  fill($("disks").tBodies[0], found.slice(0, ROWS_MAX), (disk) => disk.id, diskRow);
  let note = "";
  if (disks.length === 0) note = "No disk has registered yet.";
  else if (found.length === 0) note = "No block service matches the filter.";
  else if (found.length > ROWS_MAX) note = `${count(found.length - ROWS_MAX)} more are not shown: use the filter.`;
  text($("disks-note"), note);
}

// ---- pointing at things ----

function showTip(event) {
  const node = event.target.closest("[data-shard]");
  const shard = node && shards[Number(node.dataset.shard)];
  const tip = $("tip");
  if (!shard) { tip.hidden = true; return; }
  const lines = [`Shard ${shard.shard}: ${GROUP_TAGS[shard.state]?.[1] ?? shard.state}`];
  if (shard.state !== "missing") {
    for (const replica of shard.replicas) lines.push([hostOf(replica.store), replicaWords(replica)].filter(Boolean).join(": "));
    const change = toBe(shard);
    if (change) lines.push(`to be: ${change}`);
    lines.push(`applied index ${count(shard.applied_index)}, log ${bytes(shard.log_bytes)}`,
      `leader heard ${ago(shard.last_seen_ms_ago)}`);
  }
  text(tip, lines.join("\n"));
  tip.hidden = false;
  const box = node.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${box.bottom + 6 + scrollY}px`;
}

function highlight(event) {
  const host = event?.target.closest("tr")?.dataset.host;
  [...$("grid").children].forEach((node, i) => {
    node.classList.toggle("faded", host !== undefined && (!shards[i] || leaderHost(shards[i]) !== host));
  });
}

// ---- the loop ----

let heardAt = 0;
let lostSince = 0;

function show(state) {
  showHealth(state);
  showTiles(state);
  showShards(state);
  showGroups(state);
  showStores(state);
  showCapacity(state);
  showTransactions(state);
  showUpkeep(state);
  showDisks(state);
  text($("updated"), `updated ${new Date().toLocaleTimeString()}, every ${REFRESH_MS / 1000} s`);
}

function lost(error) {
  document.body.dataset.state = "away";
  lostSince ||= Date.now();
  $("lost-connection").hidden = false;
  const heard = heardAt ? `What is shown is from ${new Date(heardAt).toLocaleTimeString()}.` : "Nothing was heard so far.";
  text($("lost-detail"), `${heard} Trying again every ${REFRESH_MS / 1000} s (${error.message || error}).`);
  const pill = $("health");
  pill.dataset.level = "away";
  text(pill, "no connection");
  document.title = "no connection – EggsFS";
}

async function refresh() {
  const response = await fetch("/api/v1/cluster", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  const state = await response.json();
  if (!response.ok) throw new Error(state.error ?? `answer ${response.status}`);
  heardAt = Date.now();
  lostSince = 0;
  document.body.dataset.state = "live";
  $("lost-connection").hidden = true;
  show(state);
}

async function run() {
  for (;;) {
    try { await refresh(); } catch (error) { lost(error); }
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
    // A page nobody looks at asks for nothing.
    while (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
    }
  }
}

$("grid").addEventListener("pointerover", showTip);
$("grid").addEventListener("pointerdown", showTip);
$("grid").addEventListener("pointerleave", () => { $("tip").hidden = true; });
$("hosts").addEventListener("pointerover", highlight);
$("hosts").addEventListener("pointerleave", () => highlight());
$("group-filter").addEventListener("input", () => showGroups());
$("filter").addEventListener("input", () => showDisks());
run();
