"use strict";
// What a page does beyond being read: one task alone, tables in another order, and what is known of the head or neuron
// under the pointer. Text comes from model files, so it is only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const component = /\bL\d+[HN]\d+\b/;
  const numberIn = /[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?/i;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const made = (tag, text = "", properties = {}) =>
    Object.assign(document.createElement(tag), { textContent: text }, properties);
  const textOf = (cell) => (cell ? cell.textContent.trim() : "");
  document.documentElement.classList.add("scripted");

  // Of a table: its column of this name, or -1, and a row's cell in it.
  const columnOf = (table, name) => all("thead th", table).findIndex((head) => textOf(head) === name);
  const cellOf = (row, name) => {
    const column = columnOf(row.closest("table"), name);
    return column < 0 ? "" : textOf(row.cells[column]);
  };

  // Sorting: numbers from the largest, else words from A; once more, the other way. What is not known comes last.
  const NUMBER = 0, WORDS = 1, NONE = 2;
  const keyOf = (row, column) => {
    const text = textOf(row.cells[column]);
    const found = text.match(numberIn);
    if (found && found.index === 0) return { sort: NUMBER, value: Number(found[0]), text };
    return { sort: text === "-" || text === "" ? NONE : WORDS, value: 0, text };
  };
  const compared = (a, b, sign) => {
    if (a.sort !== b.sort) return a.sort - b.sort;
    return sign * (a.sort === NUMBER ? a.value - b.value : a.text.localeCompare(b.text, "en", { numeric: true }));
  };
  const sort = (table, head, column) => {
    const rows = all("tbody tr", table).map((row) => ({ row, key: keyOf(row, column) }));
    const orders = ["descending", "ascending"];
    if (!rows.some(({ key }) => key.sort === NUMBER)) orders.reverse();
    const order = orders[head.getAttribute("aria-sort") === orders[0] ? 1 : 0];
    all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    rows.sort((a, b) => compared(a.key, b.key, order === "ascending" ? 1 : -1));
    rows.forEach(({ row }) => row.parentNode.append(row));
  };
  all("table").forEach((table) => {
    all("thead th", table).forEach((head, column) => {
      const button = made("button", textOf(head) || "name", { type: "button", title: "Sort" });
      button.addEventListener("click", () => sort(table, head, column));
      if (!textOf(head)) button.classList.add("unnamed");
      head.replaceChildren(button);
    });
  });

  // One task alone: its figures and rows; panels of others grow pale.
  const show = (task) => {
    const known = new Set(data.tasks);
    const other = (name) => task !== "" && known.has(name) && name !== task;
    all("main [data-task]").forEach((part) => {
      const away = other(part.dataset.task);
      if (part.namespaceURI.endsWith("svg")) part.classList.toggle("pale", away);
      else part.hidden = away;
    });
    all("main tbody tr").forEach((row) => { row.hidden = other(cellOf(row, "task")); });
  };
  if (data.tasks.length > 1) {
    const choice = made("select", "", { id: "task" });
    choice.append(made("option", "all tasks", { value: "" }));
    data.tasks.forEach((task) => choice.append(made("option", task, { value: task })));
    choice.value = "";
    choice.addEventListener("change", () => show(choice.value));
    const bar = made("div", "", { className: "bar" });
    bar.append(made("label", "Show ", { htmlFor: "task" }), choice);
    document.querySelector("main").before(bar);
  }

  // What is known of a component, of the files and tasks that the place is about.
  const MOST = 9;
  const notesOf = (name, place) => {
    const row = place.closest("tr");
    const about = (key, column) => {
      const part = place.closest(`[data-${key}]`);
      return part ? part.dataset[key] : row ? cellOf(row, column) : "";
    };
    const scores = about("scores", "scores"), task = about("task", "task");
    const file = data.files.indexOf(scores), of = data.tasks.indexOf(task);
    const own = (data.notes[name] || []).filter((note) => (file < 0 || note[0] === file) && (of < 0 || note[1] === of));
    const lines = own.slice(0, MOST).map(([noteFile, noteTask, text]) => {
      const where = [file < 0 ? data.files[noteFile] : "", of < 0 ? data.tasks[noteTask] : ""].filter(Boolean);
      return where.length ? `${where.join(", ")}: ${text}` : text;
    });
    return own.length > MOST ? [...lines, `and ${own.length - MOST} more`] : lines;
  };
  const tip = made("div", "", { className: "tip", hidden: true });
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);
  const hide = () => { tip.hidden = true; };
  const tell = (place, x, y) => {
    const name = (place.dataset.says.match(component) || [""])[0];
    tip.replaceChildren(made("strong", place.dataset.says), ...notesOf(name, place).map((line) => made("span", line)));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 12, window.innerWidth - width - 8))}px`;
    tip.style.top = `${y - height - 12 < 8 ? Math.min(y + 18, window.innerHeight - height - 8) : y - height - 12}px`;
  };
  all(".cells title, .mark > title").forEach((title) => {
    title.parentNode.dataset.says = title.textContent;
    title.remove(); // or the browser would show it as well
  });
  all("td, tbody th").forEach((cell) => {
    const found = textOf(cell).match(component);
    if (found && found.index === 0) {
      cell.dataset.says = found[0];
      cell.tabIndex = 0;
    }
  });
  const placed = (event) => (event.target instanceof Element ? event.target.closest("[data-says]") : null);
  for (const kind of ["pointerover", "pointermove", "click"]) {
    document.addEventListener(kind, (event) => {
      const place = placed(event);
      if (place) tell(place, event.clientX, event.clientY);
      else if (kind !== "pointermove") hide();
    });
  }
  document.addEventListener("focusin", (event) => {
    const place = placed(event);
    if (!place || !place.matches(":focus-visible")) return;
    const { left, top } = place.getBoundingClientRect();
    tell(place, left, top);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  window.addEventListener("scroll", hide, { passive: true });
})();
