"use strict";
(() => {
  const ROW = 30, OVERSCAN = 8, MAX_HEIGHT = 8e6, PRINTED = 100;
  const $ = id => document.getElementById(id);
  const { n, groups, columns, data } = JSON.parse($("data").textContent);

  // The block: column after column. f24: the upper three bytes of a float32, nan is undefined. rows: `count` integers of
  // `bytes` bytes, all ones is none. All little-endian.
  const text = atob(data), size = text.length, bytes = new Uint8Array(size);
  for (let i = 0; i < size; i++) bytes[i] = text.charCodeAt(i);
  let at = 0;
  const bits = new Uint32Array(1), float = new Float32Array(bits.buffer);
  for (const column of columns) {
    if (column.type === "group") {
      column.values = bytes.subarray(at, at += n);
    } else if (column.type === "f24") {
      column.values = new Float32Array(n);
      for (let i = 0; i < n; i++, at += 3) {
        bits[0] = bytes[at] << 8 | bytes[at + 1] << 16 | bytes[at + 2] << 24;
        column.values[i] = float[0];
      }
    } else if (column.type === "rows") {
      const { bytes: width, count } = column, start = at, none = 256 ** width - 1;
      at += n * count * width;
      column.list = i => {
        const out = [];
        for (let k = 0; k < count; k++) {
          let row = 0;
          for (let b = width - 1; b >= 0; b--) row = row * 256 + bytes[start + (i * count + k) * width + b];
          if (row !== none) out.push(row);
        }
        return out.join(", ");
      };
    } else {
      column.values = Uint32Array.from({ length: n }, (_, i) => i); // the latent itself
    }
  }

  const short = v => {
    if (Number.isNaN(v)) return "–";
    if (v === 0) return "0";
    const size = Math.abs(v);
    return size < 1e-4 || size >= 1e7 ? v.toExponential(3).replace(/\.?0+e\+?/, "e") : String(+v.toPrecision(4));
  };

  const table = $("latents"), scroll = $("scroll"), body = table.tBodies[0], said = $("said");
  let order = new Uint32Array(0), sorted = { column: columns[0], down: false };

  const cell = (column, i) => {
    const td = document.createElement(column.type === "latent" ? "th" : "td");
    if (column.type === "group") {
      const dot = document.createElement("span");
      dot.className = "dot g" + column.values[i];
      td.append(dot, groups[column.values[i]]);
    } else if (column.type === "rows") {
      td.textContent = column.list(i) || "–";
      td.title = td.textContent;
    } else if (column.type === "latent") {
      td.scope = "row";
      td.textContent = i;
    } else {
      td.textContent = short(column.values[i]);
    }
    if (column.left) td.className = "l";
    return td;
  };

  const pad = height => {
    const row = document.createElement("tr"), td = document.createElement("td");
    row.className = "pad";
    row.setAttribute("aria-hidden", "true");
    td.colSpan = columns.length;
    td.style.height = height + "px";
    row.append(td);
    return row;
  };

  // Only the rows in sight are elements. Browsers lay out no more than some ten million pixels: beyond MAX_HEIGHT the
  // scroll bar moves several rows a pixel.
  let drawn = "", printing = false;
  const draw = () => {
    if (printing) return;
    const view = scroll.clientHeight, total = order.length * ROW, height = Math.min(total, MAX_HEIGHT);
    const ratio = height > view ? (total - view) / (height - view) : 1;
    const top = Math.min(scroll.scrollTop, Math.max(0, height - view));
    const first = Math.max(0, Math.floor(top * ratio / ROW) - OVERSCAN);
    const last = Math.min(order.length, first + Math.ceil(view / ROW) + 2 * OVERSCAN);
    const now = first + " " + last;
    if (now === drawn) return;
    drawn = now;
    rows(first, last, height === total ? first * ROW : Math.max(0, top - OVERSCAN * ROW), height);
  };
  const rows = (first, last, above, height) => {
    const out = document.createDocumentFragment();
    out.append(pad(above));
    for (let r = first; r < last; r++) {
      const row = document.createElement("tr");
      row.setAttribute("aria-rowindex", r + 2);
      for (const column of columns) row.append(cell(column, order[r]));
      out.append(row);
    }
    out.append(pad(Math.max(0, height - above - (last - first) * ROW)));
    body.replaceChildren(out);
  };
  const redraw = () => { drawn = ""; draw(); };

  // By keys of 24 bits, which is all that a number has here, in two passes of counting. What is undefined comes last either
  // way; equal ones stay in the order of the latents.
  const sort = () => {
    const { values, type } = sorted.column, keys = new Uint32Array(n);
    for (const i of order) {
      const v = values[i];
      let key = v;
      if (type === "f24") {
        float[0] = v || 0; // -0 is 0
        key = bits[0] >>> 8;
        key = key & 0x800000 ? 0xffffff - key : key | 0x800000;
      }
      keys[i] = v !== v ? 0xffffff : sorted.down ? 0xfffffe - key : key;
    }
    order.sort();
    for (const shift of [0, 12]) {
      const at = new Uint32Array(4097), next = new Uint32Array(order.length);
      for (const i of order) at[(keys[i] >>> shift & 4095) + 1]++;
      for (let digit = 0; digit < 4096; digit++) at[digit + 1] += at[digit];
      for (const i of order) next[at[keys[i] >>> shift & 4095]++] = i;
      order = next;
    }
  };

  const filter = () => {
    const group = $("group") ? $("group").value : "", number = $("number").value.trim();
    const column = columns[$("column").value], low = $("low"), high = $("high");
    const from = low.value.trim() === "" ? -Infinity : Number(low.value);
    const to = high.value.trim() === "" ? Infinity : Number(high.value);
    low.setAttribute("aria-invalid", Number.isNaN(from));
    high.setAttribute("aria-invalid", Number.isNaN(to));
    const limited = column && (from > -Infinity || to < Infinity);
    const wanted = number === "" ? null : new Set(number.split(/[\s,]+/).map(Number));
    const groupOf = (columns.find(c => c.type === "group") || {}).values;
    const out = [];
    for (let i = 0; i < n; i++) {
      if (group !== "" && groupOf[i] !== +group) continue;
      if (wanted && !wanted.has(i)) continue;
      if (limited && !(column.values[i] >= from && column.values[i] <= to)) continue;
      out.push(i);
    }
    order = Uint32Array.from(out);
    sort();
    table.setAttribute("aria-rowcount", order.length + 1);
    const count = v => v.toLocaleString("en");
    said.textContent = order.length === n ? `${count(n)} latents` : `${count(order.length)} of ${count(n)} latents`;
    scroll.scrollTop = 0;
    redraw();
  };

  columns.forEach((column, c) => {
    const th = table.tHead.rows[0].cells[c], button = th.querySelector("button");
    if (button) button.addEventListener("click", () => {
      const again = sorted.column === column;
      // Large numbers first; latents and groups in their order.
      sorted = { column, down: again ? !sorted.down : column.type === "f24" };
      for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      th.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      sort();
      scroll.scrollTop = 0;
      redraw();
    });
  });
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("submit", event => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(filter));
  scroll.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  addEventListener("resize", redraw);
  addEventListener("beforeprint", () => {
    printing = true;
    const last = Math.min(order.length, PRINTED);
    rows(0, last, 0, last * ROW);
    said.dataset.screen = said.textContent;
    if (last < order.length) said.textContent = `The first ${last} of ${order.length.toLocaleString("en")} latents in the chosen order`;
  });
  addEventListener("afterprint", () => { printing = false; said.textContent = said.dataset.screen; redraw(); });
  filter();
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
