// A click on a column's title sorts the table by it, a second one the other way round.
for (const title of document.querySelectorAll("th[aria-sort]")) {
  title.querySelector("button").addEventListener("click", () => {
    const body = title.closest("table").tBodies[0], column = title.cellIndex;
    const up = title.getAttribute("aria-sort") === "descending";
    for (const other of title.parentElement.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    title.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const { by } = row.cells[column].dataset, number = parseFloat(by);
      return by === "" ? null : Number.isNaN(number) || /[^\d.e+-]/i.test(by) ? by : number;
    };
    const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(b);
    body.append(...[...body.rows].sort((one, other) => {
      const a = value(one), b = value(other);
      if (a === null || b === null) return (a === null) - (b === null);  // what is unknown comes last
      return up ? compare(a, b) : compare(b, a);
    }));
  });
}
