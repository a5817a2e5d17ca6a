const bytes = id => Uint8Array.from(atob(document.getElementById(id).textContent),
                                    letter => letter.charCodeAt(0));
const palette = bytes("palette"), players = [...document.querySelectorAll(".player")];
const pictures = {}, sounds = {}, audio = new Audio();
let current = null, frame = 0;

function picture(clip) {
  const size = document.getElementById("mel-" + clip).dataset, levels = bytes("mel-" + clip);
  const image = new ImageData(+size.width, +size.height);
  levels.forEach((level, i) => image.data.set(
    [palette[3 * level], palette[3 * level + 1], palette[3 * level + 2], 255], 4 * i));
  return image;
}

function open(player) {
  if (player === current) return;
  if (current) {
    show(current, 0);
    press(false);
    current.classList.remove("on");
  }
  const clip = player.dataset.clip;
  sounds[clip] ??= URL.createObjectURL(new Blob([bytes("wav-" + clip)], {type: "audio/wav"}));
  audio.src = sounds[clip];
  current = player;
  player.classList.add("on");
}

function press(playing) {
  current.querySelector("button").ariaPressed = playing;
}

function show(player, seconds) {
  player.querySelector("input").value = seconds;
  player.querySelector(".time span").textContent = seconds.toFixed(1);
}

function follow() {
  show(current, audio.currentTime);
  cancelAnimationFrame(frame);
  if (!audio.paused) frame = requestAnimationFrame(follow);
}

for (const event of ["play", "pause", "ended"]) audio.addEventListener(event, () => {
  press(!audio.paused);
  follow();
});

for (const player of players) {
  const canvas = player.querySelector("canvas"), clip = player.dataset.clip;
  const image = pictures[clip] ??= picture(clip);
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d").putImageData(image, 0, 0);
  player.querySelector("button").onclick = () => {
    const pause = player === current && !audio.paused;
    open(player);
    pause ? audio.pause() : audio.play();
  };
  player.querySelector("input").oninput = event => {
    const seconds = +event.target.value;
    open(player);
    audio.currentTime = seconds;
    audio.play();
  };
}
