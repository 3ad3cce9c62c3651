export const DASH = "–";

const orDash = (format) => (n) => (Number.isFinite(n) ? format(n) : DASH);

function scaled(n, base, units) {
  let unit = 0;
  // 999.6 would round to 1000 of its unit
  while (Math.abs(n) >= base * 0.9995 && unit < units.length - 1) {
    n /= base;
    unit += 1;
  }
  const text = unit === 0 || Math.abs(n) >= 99.95 ? n.toFixed(0) : n.toPrecision(n < 10 ? 2 : 3);
  return `${text.replace(/\.0+$/, "")} ${units[unit]}`;
}

export const bytes = orDash((n) => scaled(n, 1000, ["B", "KB", "MB", "GB", "TB"]));
export const count = orDash((n) => n.toLocaleString("en"));
export const loss = orDash((n) => (Math.abs(n) < 100 ? n.toFixed(3) : n.toPrecision(4)));
export const percent = orDash((n) => `${(100 * n).toFixed(1)}%`);
export const rate = orDash((n) => (n > 0 && n < 10 ? n.toFixed(1) : count(Math.round(n))));

export const scientific = orDash((n) => {
  const small = n !== 0 && (Math.abs(n) < 0.01 || Math.abs(n) >= 10000);
  return small ? n.toExponential(1).replace(".0e", "e").replace("e+", "e") : String(Number(n.toPrecision(2)));
});

export const duration = orDash((seconds) => {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  const [high, low, names] =
    s < 3600 ? [s / 60, s % 60, ["min", "s"]]
    : s < 86400 ? [s / 3600, (s % 3600) / 60, ["h", "min"]]
    : [s / 86400, (s % 86400) / 3600, ["d", "h"]];
  return `${Math.floor(high)} ${names[0]} ${Math.floor(low)} ${names[1]}`;
});

export function moment(unixSeconds) {
  const date = new Date(unixSeconds * 1000);
  const time = { hour: "2-digit", minute: "2-digit" };
  if (date.toDateString() === new Date().toDateString()) return date.toLocaleTimeString([], time);
  return date.toLocaleString([], { day: "numeric", month: "short", ...time });
}
