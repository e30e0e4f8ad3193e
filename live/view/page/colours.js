// The colours of classes: Okabe and Ito's, which can be told apart with any common colour blindness, and one of Paul
// Tol's, as in the report. Classes are also numbered, so that nothing is said by colour alone.

const PALETTE = ["#56B4E9", "#0072B2", "#F0E442", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#882255"];

export function colourOf(number, classes) {
  if (classes <= PALETTE.length) return PALETTE[number % PALETTE.length];
  // neighbours differ in hue by the golden angle, and alternate between light and dark
  const [hue, light] = [((number * 137.508) % 360) / 360, number % 2 ? 0.32 : 0.7];
  return hexOf(hue, 0.6, light);
}

function hexOf(hue, saturation, light) {
  const spread = saturation * Math.min(light, 1 - light);
  const part = (n) => {
    const k = (n + hue * 12) % 12;
    const value = light - spread * Math.max(-1, Math.min(k - 3, 9 - k, 1));
    return Math.round(value * 255).toString(16).padStart(2, "0");
  };
  return `#${part(0)}${part(8)}${part(4)}`;
}

// Black or white, whichever is more legible on a colour (WCAG 2 relative luminance).
export function textOn(colour) {
  const linear = [1, 3, 5].map((i) => {
    const part = parseInt(colour.slice(i, i + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000000" : "#FFFFFF";
}

export const keyOf = (number) => (number < 9 ? String(number + 1) : number === 9 ? "0" : "");
